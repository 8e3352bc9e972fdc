import numpy as np
import pytest
import torch

from data.references import References
from memorybank.bank import BankReader, OnlineReader
from memorybank.cold import ColdStart
from memorybank.store import Generation
from memorybank.writer import compile_generation
from model.memory import MemoryBatch
from model.transformer import Memory3LM
from tests.support.memorybank import VOCABULARY, codec, model, settings

IDS_BCK = np.array(
    [
        [[-1, -1, 11], [4, 11, -1], [7, -1, 20], [-1, -1, -1]],
        [[20, 4, 2], [-1, 7, -1], [2, 11, 4], [9, -1, -1]],
    ]
)
DISTINCT = [2, 4, 7, 9, 11, 20]


@pytest.fixture(scope="module")
def generation(
    network: Memory3LM, passages: References, tmp_path_factory: pytest.TempPathFactory
) -> Generation:
    """The references of `IDS_BCK` in one batch, as a live batch would encode them."""
    folder = tmp_path_factory.mktemp("bank") / "generation-0"
    ids = np.array(DISTINCT)
    compile_generation(network.encode, passages, ids, codec(), folder, settings=settings(), batch=len(ids))
    return Generation.open(folder)


def rows() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(1))


def test_live_memory_equals_bank_memory_bitwise(
    network: Memory3LM, passages: References, generation: Generation
) -> None:
    """Through writer, files, store, codec and reader; the records keep the model's own type."""
    live = OnlineReader(passages).batch(IDS_BCK)
    bank = BankReader(generation, codec()).batch(IDS_BCK)
    assert torch.equal(live.slots_BCK, bank.slots_BCK)
    with torch.no_grad():
        from_references = network(rows(), memory=live)
        from_bank = network(rows(), memory=bank)
        without = network(rows())
    assert from_references.dtype == torch.bfloat16
    assert torch.equal(from_references, from_bank)
    assert not torch.equal(from_references, without)


def test_a_reference_is_read_once_however_many_chunks_read_it(
    passages: References, generation: Generation
) -> None:
    assert len(BankReader(generation, codec()).batch(IDS_BCK).pool.k_NLGSE) == len(DISTINCT)
    assert len(OnlineReader(passages).batch(IDS_BCK).tokens_NR) == len(DISTINCT)


@pytest.fixture(scope="module")
def exact(passages: References) -> tuple[Memory3LM, BankReader]:
    """A model in float32, to compare where the order of rounding differs, and a reader of its memories."""
    network, floats = model(torch.float32), codec(torch.float32)
    return network, BankReader(ColdStart(None, network.encode, passages, floats), floats)


def test_an_empty_slot_reads_nothing_not_the_last_record(exact: tuple[Memory3LM, BankReader]) -> None:
    network, reader = exact
    batch = reader.batch(IDS_BCK)
    nothing = MemoryBatch(pool=batch.pool, slots_BCK=torch.full_like(batch.slots_BCK, -1))
    with torch.no_grad():
        empty = network(rows(), memory=nothing)
        batch.pool.k_NLGSE[-1] = 1e4
        batch.pool.v_NLGSE[-1] = 1e4
        poisoned = network(rows(), memory=nothing)
        torch.testing.assert_close(empty, network(rows()))
    assert torch.equal(poisoned, empty)


def test_a_batch_without_any_reference(exact: tuple[Memory3LM, BankReader], passages: References) -> None:
    network, reader = exact
    for source in (reader, OnlineReader(passages)):
        with torch.no_grad():
            logits = network(rows(), memory=source.batch(np.full_like(IDS_BCK, -1)))
            torch.testing.assert_close(logits, network(rows()))
