"""`benchmarks.document_context`, end to end: both contexts, and pasts of long documents."""

import json
from pathlib import Path

from benchmarks import document_context
from memorybank.config import QueryMode
from train.arms import Arm
from train.evaluate import ArmResult, from_json


def losses(results: list[ArmResult]) -> dict[object, float]:
    return {(found.is_text, found.arm, found.query, found.pattern): found.loss for found in results}


def test_contexts_differ_and_every_document_reads_its_own_past(run: Path, tmp_path: Path) -> None:
    stem = tmp_path / "context"
    given = [str(run), "--root", str(run.parent), "--text-rows", "4", "--output", str(stem)]
    assert document_context.main(given) == 0
    stored = json.loads(stem.with_suffix(".json").read_text())
    found = {context: losses(from_json(results)) for context, results in stored["contexts"].items()}
    assert found["reference"].keys() == found["document"].keys()
    assert {arm for _, arm, *_ in found["reference"]} == {Arm.memory, Arm.shuffled, Arm.oracle}  # type: ignore[misc]
    assert all(found["reference"][arm] != loss for arm, loss in found["document"].items())

    pasts = {line["arm"]: line for line in stored["long_documents"]}
    assert len(pasts["no past"]["sums"]) >= 2
    for query in QueryMode:
        own = pasts[f"past, document, query {query.name}"]
        assert own["counts"] == [256.0] * len(own["sums"])
        for other in (
            "no past",
            f"past, reference, query {query.name}",
            f"another's past, document, query {query.name}",
        ):
            assert all(a != b for a, b in zip(own["sums"], pasts[other]["sums"], strict=True)), other
    page = stem.with_suffix(".md").read_text()
    assert page.count("**Text, query ") == 4
    assert "11 rows" not in page
    assert "| another's past, document, query previous | " in page
