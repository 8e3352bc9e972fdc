import subprocess
import sys
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig, SourceKind, check
from data.documents import Use

JSONL = SourceConfig(kind=SourceKind.jsonl, path="x.jsonl")


def config(**changes: Any) -> DataConfig:
    return DataConfig(**{"name": "x", "sources": {"a": JSONL}, **changes})


def source(**changes: Any) -> dict[str, SourceConfig]:
    return {"a": SourceConfig(**{"kind": SourceKind.jsonl, "path": "x.jsonl", **changes})}


def test_defaults_pass() -> None:
    check(config())
    check(config(sources=source(path=None), path="x.jsonl"))
    check(config(sources={"a": SourceConfig(kind=SourceKind.factbook)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a/b"}, r"data\.name='a/b' must be a plain folder name"),
        ({"name": ".."}, r"data\.name='\.\.' must be a plain folder name"),
        ({"sources": {}}, r"data\.sources is empty; choose data=factbook"),
        ({"sources": source(path=None)}, r"data\.sources\.a\.path is not set; set it, or data\.path"),
        ({"sources": source(kind=SourceKind.hub)}, r"data\.sources\.a\.name is not set"),
        ({"sources": source(weight=-1.0)}, r"data\.sources\.a\.weight=-1\.0 must not be negative"),
        ({"sources": source(weight=float("nan"))}, r"data\.sources\.a\.weight=nan"),
        ({"sources": source(weight=0.0)}, r"no training text"),
        ({"sources": source(use=Use.reference)}, r"no training text"),
        ({"sources": source(min_chars=-1)}, r"data\.sources\.a\.min_chars=-1"),
        ({"sources": source(max_documents=0)}, r"data\.sources\.a\.max_documents=0"),
        ({"sources": source(kind=SourceKind.factbook, max_documents=3)}, r"the factbook decides itself"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0 must be"),
        ({"test_fraction": -0.1}, r"data\.test_fraction=-0\.1 must be"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, r"leave nothing to train on"),
        ({"character_coverage": 0.5}, r"data\.character_coverage=0\.5"),
        ({"vocab_size": 100}, r"data\.vocab_size=100 is too small"),
        ({"num_workers": 0}, r"data\.num_workers=0 is too small"),
        ({"documents_per_shard": 0}, r"data\.documents_per_shard=0 is too small"),
        ({"reference_tokens": 8}, r"data\.reference_tokens=8 is too small"),
        ({"tokenizer_model": "missing.model"}, r"data\.tokenizer_model=missing\.model is no file"),
    ],
)
def test_what_cannot_work_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(config(**changes))


def test_no_heavy_import() -> None:
    script = (
        "import data.config, sys; print({'torch', 'numpy', 'datasets', 'sentencepiece'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
