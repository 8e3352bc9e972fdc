"""`benchmarks.plan`, end to end: the files of a run, and the memory of real ranks."""

from pathlib import Path

import pytest

from benchmarks import plan


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_every_checkpoint_and_generation_of_a_run_is_compared(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.md"
    assert plan.main(["--run", str(run), "--only", "no case is called so", "--out", str(out)]) == 0
    rows = [cells(line) for line in out.read_text().splitlines() if line.startswith("| m/")]
    files, epochs = ([row for row in rows if len(row) == count] for count in (4, 7))
    made = {path.name for kind in ("checkpoints/*", "bank/generation-*") for path in run.glob(kind)}
    assert {name.removeprefix("m/") for name, *_ in files} == made
    assert {name.partition("-")[0] for name in made} == {"warmup", "continual", "generation"}
    for name, planned, found, ratio in files:
        of_folder = sum(path.stat().st_size for path in run.glob(f"*/{name[2:]}/**/*") if path.is_file())
        assert int(found.replace(",", "")) == of_folder
        assert float(ratio) == pytest.approx(int(planned.replace(",", "")) / of_folder, abs=1e-4)
        assert float(ratio) == pytest.approx(1, abs=0.02)
    assert {name.removeprefix("m/") for name, *_ in epochs} == {name for name in made if name[0] == "g"}
    for _, may_read, chunks, found, _, _, most in epochs:
        assert int(found) <= int(most) == min(int(may_read), int(chunks))


@pytest.mark.slow
def test_the_growth_of_real_ranks_is_what_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--only", "saving.asynchronous=false"]) == 0
    (row,) = (cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| warmup"))
    assert row[1].endswith("saving.asynchronous=false")
    assert float(row[4]) == pytest.approx(1, abs=0.1)  # tensors alone
    assert float(row[7]) == pytest.approx(1, abs=0.2)  # as runs are
