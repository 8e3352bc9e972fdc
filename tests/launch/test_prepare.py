"""Input that cannot be used: exit code 2, one line, and what to change."""

import json
from pathlib import Path

import pytest

from benchmarks.documentation import corpus_settings, topics
from launch.compose import compose_config, save_config
from tests.support.launch import within

GOOD = json.dumps({"id": "a", "title": "a", "text": "A line of text."})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{GOOD}\n{{nonsense\n", "topics.jsonl, line 2 is no JSON: "),
        (f"{GOOD}\n[1]\n", "topics.jsonl, line 2 is no JSON object but b'[1]"),
        (
            f'{GOOD}\n{{"id": "b", "title": "b"}}\n',
            "topics.jsonl, line 2: a document without text: it has no field 'text'",
        ),
        (
            f'{GOOD}\n{{"id": "b", "title": "b", "text": " "}}\n',
            "record topics.jsonl:2: a document without text (field 'text')",
        ),
        (f'{GOOD}\n{{"text": "no id"}}\n', "record topics.jsonl:2: a document without id (field 'id')"),
        ("", "topics.jsonl holds no documents; give a source that does"),
        (f"{GOOD}\n{GOOD}\n", "two documents have the id 'a'"),
        (
            "".join(
                json.dumps({"id": i, "title": "", "text": f"Just a few words {i}."}) + "\n" for i in range(9)
            ),
            "data.vocab_size=640 is larger than the text allows: at most ",
        ),
    ],
    ids=["no-json", "no-object", "no-text", "blank-text", "no-id", "empty", "same-id", "vocabulary"],
)
def test_corpus_that_cannot_be_used(content: str, said: str, tmp_path: Path) -> None:
    corpus = tmp_path / "topics.jsonl"
    corpus.write_text(content)
    done = within("prepare", *corpus_settings(tmp_path / "runs", corpus))
    assert done.code == 2
    assert said in done.err
    assert done.err.startswith("memory3 prepare: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.path=nowhere.jsonl"], "data.sources.documents: nowhere.jsonl does not exist; set data.path"),
        (["data.vocab_sise=900"], "there is no key data.vocab_sise; did you mean data.vocab_size?"),
        (["data.sources.documents.text_field=body"], "set text_field to the one that holds the text"),
        (["data.tokenizer_model=none.model"], "data.tokenizer_model=none.model is no file"),
        (["retrieval.embedder.kind=folder", "retrieval.embedder.path=nowhere"], "nowhere"),
    ],
    ids=["missing-file", "typo", "text-field", "tokenizer", "embedder"],
)
def test_setting_that_cannot_be_used(changes: list[str], said: str, tmp_path: Path) -> None:
    corpus = topics(tmp_path / "topics.jsonl", limit=2000)
    done = within("prepare", *corpus_settings(tmp_path / "runs", corpus), *changes)
    assert done.code == 2
    assert said in done.err
    assert done.err.splitlines()[-1].startswith("memory3 prepare: ")
    assert "Traceback" not in done.err


def test_a_corpus_that_runs_were_trained_on_is_not_replaced(tmp_path: Path) -> None:
    corpus = topics(tmp_path / "topics.jsonl", limit=2000)
    settings = corpus_settings(tmp_path / "runs", corpus)
    assert within("prepare", *settings).code == 0
    folder = tmp_path / "runs/mine"
    save_config(compose_config([*settings, "run=mine"]), folder / "config.yaml")

    # Nothing was trained: another text takes its place.
    corpus.write_text(corpus.read_text() + GOOD + "\n")
    assert within("prepare", *settings).code == 0

    (folder / "checkpoints/warmup-00000001").mkdir(parents=True)
    (folder / "checkpoints/warmup-00000001/manifest.json").touch()
    prepared = tmp_path / "runs/prepared/jsonl"
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    assert within("prepare", *settings).code == 0  # the same text, the same settings
    for changes, kind in [(["data.split_seed=1"], "corpus"), (["data.vocab_size=700"], "tokenizer")]:
        done = within("prepare", *settings, *changes)
        assert done.code == 2
        assert f"{prepared / kind} is not what these settings" in done.err
        assert "trained with it: mine; give this corpus a place of its own, data.name=NAME" in done.err
    assert all(path.read_bytes() == content for path, content in before.items())
    assert within("prepare", *settings, "data.split_seed=1", "data.name=other").code == 0


def test_a_corpus_that_holds_nothing_out_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    corpus, root = topics(tmp_path / "topics.jsonl", limit=2000), tmp_path / "runs"
    settings = [*corpus_settings(root, corpus), "experiment=quick", "debug=smoke", "run=mine"]
    done = within("pretrain", *settings, "data.validation_fraction=0")
    assert done.code == 2
    assert "the validation split holds 0 of " in done.err
    assert (
        "set data.validation_fraction higher than it is (0.1, say), or give more documents: each" in done.err
    )
    assert not (root / "mine").exists()  # so that the same run may begin with other settings
    plan = within("plan", *settings, "data.validation_fraction=0")
    assert "the validation split holds 0 of " in plan.out
    assert (
        "set: data.validation_fraction higher than it is (0.1, say), or give more documents: each" in plan.out
    )
    assert "the test split" not in plan.out
