"""`memory3 checkpoint`: what is listed, what is found damaged, what may go, and that others can load an export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import checkpoint
from launch.lock import only_user
from tests.support.launch import Finished, trained, within
from train.export import load_exported

ENDS = ["warmup-00000004", "continual-00000004"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of run `m`, beside the prepared corpus."""
    shutil.copytree(trained().main, tmp_path / "m")
    (tmp_path / "prepared").symlink_to(trained().root / "prepared")
    return tmp_path


def ask(root: Path, action: str, *options: str) -> Finished:
    return within("checkpoint", action, str(root / "m"), *options, "--root", str(root))


def published(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "m/checkpoints").iterdir())


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_list_says_what_is_there_and_why(root: Path) -> None:
    table = ask(root, "list").out
    for name in [*ENDS, "generation-continual-0001", "best", "last 2", "end of a stage, or branch point"]:
        assert name in table
    listed = json.loads(ask(root, "list", "--json", "--keep-last", "1").out)
    assert [entry["checkpoint"] for entry in listed] == [
        f"{stage}-{step:08d}" for stage in ("warmup", "continual") for step in (2, 4)
    ]
    assert {entry["ranks"] for entry in listed} == {2}
    losses = [entry["state"]["validation"] for entry in listed]
    lines = [json.loads(line) for line in (root / "m/metrics.jsonl").read_text().splitlines()]
    assert losses == [
        line.get("validation_memory", line["validation_none"]) for line in lines if "validation_none" in line
    ]
    assert [entry["checkpoint"] for entry in listed if "last 1" in entry["kept"]] == ENDS


def test_verify_names_what_is_damaged_and_fails(root: Path) -> None:
    assert ask(root, "verify").code == 0
    damage(root / "m/checkpoints/continual-00000004/engine/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    found = ask(root, "verify")
    assert found.code == checkpoint.DAMAGED
    (line,) = [line for line in found.out.splitlines() if "is damaged" in line]
    assert line.startswith("continual-00000004: ")
    assert line.endswith("engine/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    assert "resumes at the newest whole one" in found.out
    assert ask(root, "verify", "warmup-00000004").code == 0
    assert (
        "there is no checkpoint 'warmup-4'; there are warmup-00000002" in ask(root, "verify", "warmup-4").err
    )


@pytest.mark.parametrize("before", ["hold", "damage"])
def test_verify_takes_what_a_run_rotates_away_for_no_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    gone, original = root / "m/checkpoints/warmup-00000002", getattr(checkpoint, before)

    def rotated(folder: Path) -> object:
        if folder == gone:
            shutil.rmtree(folder)
        return original(folder)

    monkeypatch.setattr(checkpoint, before, rotated)
    found = ask(root, "verify")
    assert found.code == 0
    assert "warmup-00000002: gone meanwhile: its run, which trains, has published newer ones\n" in found.out
    assert found.out.count(": whole, ") == 3


def test_verify_looks_for_the_generation_that_is_named(root: Path) -> None:
    """Fault 26."""
    shutil.rmtree(root / "m/bank/generation-continual-0000")
    assert "generation-continual-0000 is missing" in ask(root, "verify").out
    shutil.copytree(root / "m/bank/generation-continual-0001", root / "m/bank/generation-continual-0000")
    assert "generation-continual-0000 is " in ask(root, "verify").out


def test_prune_says_what_would_go_and_then_deletes_it(root: Path) -> None:
    (root / "m/checkpoints/warmup-00000003.partial").mkdir()
    bank = root / "m/bank"  # the newest two stay, and what a checkpoint names: 0001
    shutil.copytree(bank / "generation-continual-0001", bank / "generation-continual-0002")
    before = published(root)
    options = ["--keep-last", "1", "--keep-best", "0"]
    dry = ask(root, "prune", "--dry-run", *options)
    assert dry.code == 0
    assert "warmup-00000002: goes" in dry.out
    assert "warmup-00000004: stays: end of a stage, or branch point, last 1" in dry.out
    assert "bank/generation-continual-0000: goes, no checkpoint that stays names it" in dry.out
    assert "2 checkpoints and" in dry.out
    assert (bank / "generation-continual-0000").exists()
    assert published(root) == before
    with only_user(root / "m"):
        assert "is in use" in ask(root, "prune", *options).err
    assert published(root) == before
    done = ask(root, "prune", *options)
    assert done.out.startswith("2 checkpoints went")
    assert "bank/generation-continual-0000 went" in done.out
    assert sorted(path.name for path in bank.glob("generation-*")) == [
        "generation-continual-0001",
        "generation-continual-0002",
    ]
    assert published(root) == sorted(ENDS)


def test_prune_never_deletes_the_last_whole_one(root: Path) -> None:
    damage(root / "m/checkpoints/continual-00000004/model.safetensors")
    before = published(root)
    refused = ask(root, "prune", "--keep-last", "1", "--keep-best", "0")
    assert refused.code == 2
    assert "none of the continual checkpoints that would stay is whole (continual-00000004)" in refused.err
    assert published(root) == before


def test_rules_that_are_none_are_refused(root: Path) -> None:
    assert "--keep-last 0 is below 1" in ask(root, "prune", "--keep-last", "0").err


def test_a_run_without_checkpoints_is_named(root: Path) -> None:
    shutil.rmtree(root / "m/checkpoints")
    assert f"{root}/m has no checkpoint yet" in ask(root, "list").err
    assert "is not a run folder" in within("checkpoint", "list", "nothing", "--root", str(root)).err


def test_an_export_is_loaded_by_torch_and_read_by_generate(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "export"
    done = ask(root, "export", str(target))
    assert done.code == 0, done.err
    assert not (target / "engine").exists()
    weights = load_file(root / "m/checkpoints/continual-00000004/model.safetensors")
    model = load_exported(target)
    assert {name: value.dtype for name, value in model.state_dict().items()} == dict.fromkeys(
        weights, torch.bfloat16
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    options = ["--root", str(root), "--prompt", "The operators", "--max-new-tokens", "3"]
    exported, own = (within("generate", str(folder), *options) for folder in (target, root / "m"))
    assert exported.code == 0, exported.err
    assert exported.out == own.out
    assert "with memory" in own.out

    assert f"{target} exists" in ask(root, "export", str(target)).err
    assert "is an export" in within("checkpoint", "list", str(target), "--root", str(root)).err
    damage(target / "model.safetensors")
    with pytest.raises(ValueError, match=r"is damaged: model.safetensors"):
        load_exported(target)
