"""Run folders as training leaves them, without training: only their lines and settings."""

import json
from pathlib import Path
from typing import Any


def lines(*, warmup: int = 40, continual: int = 40, has_memory: bool = True) -> list[dict[str, Any]]:
    """What a run of these steps writes, two tokens a step, a validation every ten, a bank epoch every twenty."""
    written: list[dict[str, Any]] = []
    now, tokens = 1e9, 0 if warmup else 80
    for stage, steps in (("warmup", warmup), ("continual", continual)):
        reads = has_memory and stage == "continual"
        for step in range(1, steps + 1):
            where = {"stage": stage, "step": step}
            if reads and step % 20 == 1:
                now += 3
                bank = {"references": 100 * step, "chunks": 8, "empty": 1, "refused_own_document": 2}
                bank |= {"refused_overlap": 3, "compiled": 50, "seconds_search": 1.0, "seconds_compile": 2.0}
                written.append(
                    {**where, "epoch": step // 20, **{f"bank_{k}": v for k, v in bank.items()}, "time": now}
                )
            now += 1
            tokens += 2
            update: dict[str, Any] = {
                "num_steps": 40,
                "epoch": 0,
                "loss": 8 / step,
                "grad_norm": 1.0,
                "lr": 1e-3,
            }
            update |= {"skipped": False, "tokens": tokens, "tokens_per_second": 2.0, "mfu": None}
            update |= {
                "seconds_data": 0.1,
                "seconds_retrieve": 0.2 if reads else 0.0,
                "seconds_compute": 0.6 if reads else 0.8,
                "seconds_update": 0.1,
            }
            update |= {"generation": "generation-continual-0000" if reads else None}
            update |= {"generation_age": (step - 1) % 20 + 1 if reads else None}
            if reads:
                update |= {"empty_slots": 0.25, "distinct_references": 7, "retrieval_score": 0.5}
            written.append({**where, **update, "time": now})
            if step % 10 == 0:
                checked: dict[str, Any] = {"validation_none": 3.0 - step / 100, "validation_tokens": 512}
                checked |= {"query": None, "pattern": None, "overlap_limit": None, "generation_age": None}
                if reads:
                    checked |= {
                        "validation_memory": 2.9 - step / 100,
                        "validation_shuffled": 3.1 - step / 100,
                    }
                    checked |= {
                        "memory_attention": 0.08,
                        "memory_attention_layers": [0.06, 0.1],
                        "query": "own",
                    }
                    checked |= {"pattern": "training", "overlap_limit": 2 / 3, "generation_age": step % 20}
                now += 0.5
                written.append({**where, **checked, "seconds_validation": 0.5, "time": now})
    return written


def rollback() -> dict[str, Any]:
    """A rollback of the warmup from step 11 to step 8, past the rows of two updates."""
    event: dict[str, Any] = {
        "stage": "warmup",
        "step": 8,
        "event": "rollback",
        "checkpoint": "warmup-00000008",
    }
    event |= {"reason": "loss 9.000 stands out, 2 bad updates in a row", "rollback": 1, "diverged_at": 11}
    event |= {"steps_undone": 3, "passed_over_first": 9, "passed_over_last": 10, "rows_passed_over": 16}
    return {**event, "lr_factor": 1.0, "time": 1.5e9}


def run_folder(folder: Path, written: list[dict[str, Any]], settings: str = "seed: 0\n") -> Path:
    """A run folder with these lines."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    (folder / "config.yaml").write_text(f"run: {folder.name}\n{settings}")
    return folder
