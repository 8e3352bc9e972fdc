"""What the tests of memorybank/ read and are encoded with."""

import pytest

from data.references import References
from model.transformer import Memory3LM
from tests.support.memorybank import model, references


@pytest.fixture(scope="module")
def passages() -> References:
    return references()


@pytest.fixture(scope="module")
def network() -> Memory3LM:
    return model()
