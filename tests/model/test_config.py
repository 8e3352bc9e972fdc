import json
import subprocess
import sys
from typing import Any

import pytest

from model.config import ModelConfig
from tests.support.model import tiny_config


def test_defaults_are_possible() -> None:
    ModelConfig().check()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_heads": 5}, "num_kv_heads"),
        ({"head_size": 7}, "head_size"),
        ({"num_memory_layers": 4}, "num_memory_layers"),
        ({"num_memory_layers": -1}, "num_memory_layers"),
        ({"tokens_kept": 13}, "tokens_kept"),
        ({"row_tokens": 33}, "row_tokens"),
        ({"prefix_ids": [50]}, "prefix_ids"),
        ({"width": 0}, "width"),
        ({"rope_base": 0.0}, "rope_base"),
    ],
)
def test_impossible_sizes_are_refused_by_name(change: dict[str, Any], key: str) -> None:
    config = tiny_config(**change)
    with pytest.raises(ValueError, match=rf"model\.{key}=.*: set ") as refusal:
        config.check()
    assert repr(getattr(config, key)) in str(refusal.value)


def test_the_layout_is_json_and_changes_with_what_a_record_means() -> None:
    layout = tiny_config().layout()
    assert json.loads(json.dumps(layout)) == layout
    for change in ({"prefix_ids": [1]}, {"rope_base": 5e5}, {"tokens_kept": 2}, {"select_title": False}):
        assert tiny_config(**change).layout() != layout
    assert tiny_config(vocab_size=60, activation_checkpointing=True).layout() == layout


def test_sizes_and_costs_need_no_torch() -> None:
    code = "import sys, model.config, model.flops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
