"""The price of plain top-level packages, paid by rules (architecture.md, section 1)."""

from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["conf", "data", "launch", "memorybank", "model", "train"]


def test_no_other_distribution_owns_our_package_names() -> None:
    owners = packages_distributions()
    strangers = {name: set(owners.get(name, [])) - {"memory3-pretrain"} for name in PACKAGES}
    assert not any(strangers.values()), strangers


@pytest.mark.parametrize("name", PACKAGES)
def test_our_packages_are_imported_from_this_checkout(name: str) -> None:
    module = __import__(name)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name
