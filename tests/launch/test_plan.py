"""`memory3 plan`: figures against the configuration and real files, what does not fit and what would, and no torch."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launch.compose import compose_config, to_yaml
from launch.devices import DEVICES, device_here
from launch.origins import flat
from launch.planning import Site, plan
from launch.resolved import sections
from model.transformer import Memory3LM
from tests.support.launch import trained, within

PAPER = ("model=paper_2b4", "data.vocab_size=60416", "experiment=quick")
H100 = ("--device", "h100", "--config-only")


def planned(*arguments: str) -> dict[str, Any]:
    done = within("plan", *arguments, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_parameters_are_exact_part_by_part() -> None:
    found = planned("model=micro", "data.vocab_size=8192", "--config-only")["parameters"]
    model = Memory3LM(compose_config(["model=micro"]).model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert found["attention"] == sum(size for name, size in sizes.items() if ".qkv" in name or ".out" in name)
    assert found["feed_forward"] == sum(size for name, size in sizes.items() if ".ffn." in name)
    assert found["norms"] == sum(size for name, size in sizes.items() if "norm" in name)
    assert (found["embedding"], found["head"]) == (sizes["embedding.weight"], sizes["head.weight"])
    assert found["total"] == sum(sizes.values())


def test_the_papers_model_on_gpus() -> None:
    settings = ("engine.num_ranks=8", "warmup.rows_per_step=2048", "warmup.steps=1000", "warmup.micro_rows=4")
    found = planned(*PAPER, *settings, "continual=null", *H100, "--mfu", "0.5", "--price", "2")
    [stage] = found["stages"]
    assert stage["tokens"] == 1000 * 2048 * 2048
    palm = 6 * (found["parameters"]["non_embedding"] + found["parameters"]["head"]) + 12 * 44 * 3200 * 2048
    assert stage["token_flops"]["palm"] == palm
    assert stage["seconds"] == pytest.approx(stage["tokens"] * palm / (0.5 * 989e12 * 8))
    assert stage["tokens_per_second"] / 8 == pytest.approx(0.5 * 989e12 / palm)
    assert stage["price"] == pytest.approx(stage["seconds"] / 3600 * 8 * 2)
    zero = [stage["memory"][f"zero_{number}"] for number in range(4)]
    total = found["parameters"]["total"]
    assert (zero[0]["masters"], zero[0]["moments"]) == (4 * total, 8 * total)
    assert zero[1]["moments"] == total  # eight bytes, on eight ranks
    assert zero[1]["gradients"] == 4 * total
    assert zero[3]["total"] < zero[0]["total"]


@pytest.mark.parametrize(
    ("experiment", "billions", "reads"),
    [
        ("paper_2b4", {"warmup": 3100, "continual": 120}, {"continual"}),
        ("paper_0b92", {"warmup": 60, "continual": 22}, {"continual"}),
        ("paper_0b92_memory", {"warmup": 60, "continual": 22}, {"warmup", "continual"}),
    ],
)
def test_the_papers_runs_have_its_tokens_and_fit_on_gpus(
    experiment: str, billions: dict[str, int], reads: set[str]
) -> None:
    found = planned(f"experiment={experiment}", *H100)
    tokens = {stage["name"]: stage["tokens"] / 1e9 for stage in found["stages"]}
    assert tokens == pytest.approx(billions, rel=0.005)
    assert {stage["name"] for stage in found["stages"] if stage["memory_token_flops"]} == reads
    assert found["problems"] == []
    memories = {name: found["config"][name]["memory"] for name in tokens}
    assert {name for name, memory in memories.items() if memory and memory["source"] == "online"} == reads
    assert {found["config"][name]["rows_per_step"] * 2048 for name in tokens} == {2**22}  # "about 4M"
    assert [found["config"][name]["peak_lr"] for name in ("warmup", "continual")] == [8e-4, 5e-5]


def test_checkpoints_that_stay_are_counted_by_every_rule() -> None:
    settings = ("experiment=quick", "continual=null", "warmup.steps=1000", "saving.every_steps=100")
    kept = {
        **{"saving.keep_last=1 saving.keep_best=0": 1, "saving.keep_last=3 saving.keep_best=1": 4},
        **{"saving.keep_every=200 saving.keep_best=0": 6, "saving.keep_last=20": 10},
    }
    for rules, number in kept.items():
        assert planned(*settings, *rules.split(), "--config-only")["disk"]["checkpoints"] == number


def test_what_does_not_fit_is_named_with_settings_that_fit() -> None:
    settings = [
        *PAPER,
        "engine.num_ranks=8",
        "warmup.rows_per_step=128",
        "warmup.micro_rows=16",
        "continual=null",
    ]
    [problem] = planned(*settings, *H100)["problems"]
    assert problem["says"].startswith("warmup: a rank takes ")
    assert "largest: activations" in problem["says"]
    proposed, taken = problem["remedy"].split(" takes ")
    assert taken.endswith("GiB")
    assert planned(*settings, *proposed.split(), *H100)["problems"] == []
    [hopeless] = planned(*settings, "--device", "h100", "--config-only", "--memory", "0.5")["problems"]
    assert hopeless["remedy"].startswith("nothing fits, not even on 4,096 ranks")


@pytest.mark.parametrize(
    "settings",
    [
        ("experiment=quick", "model=paper_2b4", "data.vocab_size=60416", "--device", "rtx4090"),
        ("experiment=paper_2b4", "engine.num_ranks=1", "--device", "a100-40"),
        ("experiment=paper_2b4", "engine.num_ranks=2", "--device", "rtx4090"),
    ],
)
def test_what_is_proposed_fits_in_both_stages(settings: tuple[str, ...]) -> None:
    [problem] = planned(*settings, "--config-only")["problems"]
    assert "warmup: a rank takes " in problem["says"]
    assert "continual: a rank takes " in problem["says"]
    proposed, _ = problem["remedy"].split(" takes ")
    before, after = (
        planned(*settings, "--config-only"),
        planned(*settings, *proposed.split(), "--config-only"),
    )
    assert after["problems"] == []
    assert [stage["tokens"] for stage in after["stages"]] == [stage["tokens"] for stage in before["stages"]]


def test_more_rows_a_step_are_proposed_last_and_said() -> None:
    settings = (
        *PAPER,
        "engine.num_ranks=1",
        "warmup.rows_per_step=1",
        "warmup.micro_rows=1",
        "continual=null",
    )
    [problem] = planned(*settings, "--device", "a100-40", "--config-only")["problems"]
    proposed, taken = problem["remedy"].split(" takes ")
    assert "warmup.rows_per_step=" in proposed
    assert taken.endswith("and trains more rows a step")
    assert planned(*settings, *proposed.split(), "--device", "a100-40", "--config-only")["problems"] == []


def test_an_index_that_the_disk_or_the_memory_cannot_hold_is_named() -> None:
    config = compose_config(["experiment=quick"])
    site = Site(device=DEVICES["h100"], mfu=0.4, references=112_000_000, free_disk=10**12, host_memory=10**11)
    assert plan(config, site).problems == []
    [memory, disk] = plan(config, replace(site, free_disk=10**11, host_memory=5 * 10**10)).problems
    assert memory.says.startswith("building the search index over 112,000,000 references takes 61.8 GiB")
    assert "largest: search vectors and index 171 GiB" in disk.says
    there = replace(site, free_disk=10**10, held=plan(config, site).disk.written - 10**10)
    assert plan(config, there).problems == []


def test_chunks_that_ask_take_room_wherever_training_gets_memories_from() -> None:
    bank, online = (
        planned("experiment=quick", f"continual.memory.source={source}", "--config-only")["disk"]["queries"]
        for source in ("bank", "online")
    )
    assert bank == online > 0
    assert planned("experiment=quick", "continual.memory=null", "--config-only")["disk"]["queries"] == 0


def test_a_corpus_read_too_often_is_named() -> None:
    config, site = compose_config(["experiment=quick"]), Site(device=DEVICES["h100"], mfu=0.4)
    assert config.warmup is not None
    tokens = config.warmup.steps * config.warmup.rows_per_step * config.model.row_tokens
    assert plan(config, replace(site, tokens=tokens // 39)).problems == []
    found = plan(config, replace(site, tokens=tokens // 80)).problems[0]
    assert found.says.startswith("warmup: ")
    assert "are 80 passes over factbook" in found.says
    assert found.remedy.startswith(f"warmup.steps={config.warmup.steps // 2} at most")


def test_a_cpu_rank_needs_room_for_the_gaps_of_its_heap() -> None:
    settings = ("experiment=quick", "continual=null", "--config-only")
    taken = planned(*settings)["stages"][0]["memory"]["zero_1"]
    assert taken["resident"] == taken["total"] + taken["gaps"] > 1.2 * taken["total"]
    between = str((taken["total"] / 0.92 + taken["gaps"] / 2) / 2**30)
    [problem] = planned(*settings, "--memory", between)["problems"]
    assert problem["says"].startswith("warmup: a rank takes ")
    on_gpu = planned(*settings, "--device", "h100")["stages"][0]["memory"]["zero_1"]
    assert on_gpu["resident"] == on_gpu["total"]
    assert "with the heap's gaps" in within("plan", *settings).out


def test_memory_adds_what_its_source_costs() -> None:
    added = {
        source: planned("experiment=quick", f"continual.memory.source={source}", "--config-only")["stages"][1]
        for source in ("bank", "mixed", "online")
    }
    assert planned("experiment=quick", "--config-only")["stages"][0]["memory_token_flops"] == 0
    flops = [stage["memory_token_flops"] for stage in added.values()]
    assert flops == sorted(flops)
    activations = [stage["memory"]["zero_1"]["activations"] for stage in added.values()]
    assert activations[0] < activations[1] == activations[2]


def test_disk_that_is_too_small_is_answered_by_a_codec_and_fewer_checkpoints() -> None:
    config = compose_config(["experiment=quick", "saving.every_steps=10"])
    config.continual.epoch_steps = "1"  # type: ignore[union-attr]
    site = Site(device=DEVICES["h100"], mfu=0.4)
    needed = plan(config, site)
    assert needed.problems == []
    small = plan(config, Site(device=DEVICES["h100"], mfu=0.4, free_disk=needed.disk.written * 3 // 4))
    [problem] = small.problems
    assert problem.remedy.startswith("saving.keep_last=1")
    fewest = compose_config(
        ["experiment=quick", "saving.every_steps=10", "saving.keep_last=1", "saving.keep_generations=1"]
    )
    fewest.continual.epoch_steps = "1"  # type: ignore[union-attr]
    least = plan(fewest, site).disk.written
    smaller = plan(config, Site(device=DEVICES["h100"], mfu=0.4, free_disk=least - 1))
    assert "codec.kind=" in smaller.problems[0].remedy
    hopeless = plan(config, Site(device=DEVICES["h100"], mfu=0.4, free_disk=1000))
    assert hopeless.problems[0].remedy.startswith("free ")


def test_a_real_run_wrote_what_was_planned() -> None:
    from tests.support.launch import run_settings

    root = trained().root
    found = planned(*run_settings(root, "m"))
    folders = [path for path in (root / "m" / "checkpoints").iterdir() if path.is_dir()]
    assert len(folders) == found["disk"]["checkpoints"]
    generations = sorted((root / "m" / "bank").glob("generation-continual-*"))
    searches = sorted((root / "m" / "neighbours").glob("continual-*"))
    epochs = found["bank"]["epochs"]
    assert len(generations) == len(searches) == len(epochs) > 1
    for search, epoch in zip(searches, epochs, strict=True):
        report = json.loads((search / "manifest.json").read_text())["extra"]
        validation = np.load(search / "validation.npy")
        assert epoch["references"] == report["references"]
        assert epoch["chunks"] == report["chunks"] + validation.size
        ids = np.concatenate([np.load(search / "training.npy").ravel(), validation.ravel()])
        compiled = len(np.unique(ids[ids >= 0]))
        assert epoch["most"] == epoch["found"] == compiled
        assert epoch["expected"] == pytest.approx(compiled, rel=0.25)
    assert found["bank"]["exact"]
    assert (
        found["bank"]["expected_references"]
        == found["bank"]["references"]
        == max(epoch["found"] for epoch in epochs)
    )
    largest = max(_size(folder) for folder in generations)
    assert found["bank"]["generation_bytes"] == pytest.approx(largest, rel=0.02)
    assert found["disk"]["prepared"] > 0
    assert found["site"]["references"] > 0


def test_a_search_ahead_finds_what_the_run_will_find(tmp_path: Path) -> None:
    """Before it, the number of references is an estimate; after it, it is known, and the run need not search."""
    from tests.support.launch import run_settings

    root = trained().root
    (tmp_path / "prepared").symlink_to(root / "prepared")
    ahead = [*run_settings(root, "m"), f"paths.root={tmp_path}"]
    before = planned(*ahead)["bank"]
    assert not before["exact"]
    assert before["expected_references"] == max(epoch["expected"] for epoch in before["epochs"])
    assert before["expected_bytes"] < before["generation_bytes"]
    assert (
        planned(*ahead, "--search")["bank"]
        == planned(*ahead)["bank"]
        == planned(*run_settings(root, "m"))["bank"]
    )
    for folder in (root / "m" / "neighbours").iterdir():
        searched = [
            json.loads((run / folder.name / "manifest.json").read_text())
            for run in (folder.parent, tmp_path / "m" / "neighbours")
        ]
        assert searched[0]["fingerprint"] == searched[1]["fingerprint"]
        assert searched[0]["files"] == searched[1]["files"]
    other = planned(*ahead, "seed=5")["bank"]  # other rows
    assert not other["exact"]
    assert other["references"] > before["expected_references"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["continual=null"], "no stage of this run reads memory"),
        (["run=ahead-b", "warmup=null", "continual.branch_from=mm"], "did you mean continual.branch_from=m?"),
        (["continual.steps=41"], "holds a run of another configuration"),
        (["data.name=other"], "run `memory3 prepare`"),
    ],
)
def test_searches_that_cannot_be_made_are_refused(settings: list[str], said: str) -> None:
    from tests.support.launch import run_settings

    done = within("plan", *run_settings(trained().root, "m"), "--search", *settings)
    assert done.code == 2
    assert said in done.err


def test_a_run_that_branches_from_another_reads_what_that_one_had_finished() -> None:
    from tests.support.launch import run_settings

    root = trained().root
    alone = planned(*run_settings(root, "m"))["bank"]
    branch = [*run_settings(root, "m"), "run=b", "warmup=null"]
    for epoch, same in zip(
        planned(*branch, "continual.branch_from=m")["bank"]["epochs"], alone["epochs"], strict=True
    ):
        assert epoch == same | {"found": None, "most": epoch["most"]}
    unknown = planned(*branch, "continual.branch_from=of-tomorrow")["bank"]
    assert unknown["expected_references"] is None
    assert unknown["references"] > alone["references"]


def test_a_corpus_of_very_many_documents_is_planned_by_its_sizes_alone() -> None:
    from data.prepare import prepared_sizes
    from launch.forecast import forecast
    from tests.support.launch import run_settings

    root = trained().root
    config = compose_config(run_settings(root, "m"))
    sizes = prepared_sizes(config.data, root / "prepared")
    assert sizes is not None
    assert forecast(config, sizes)
    assert forecast(config, replace(sizes, documents=3_000_000)) is None  # in two epochs or more
    assert forecast(config, replace(sizes, references=100_000_000)) is None


def test_what_training_will_refuse_of_a_prepared_corpus_is_said() -> None:
    from tests.support.launch import run_settings

    settings = [*run_settings(trained().root, "m"), "+warmup.weights.documents=0"]
    remedies = {problem["says"]: problem["remedy"] for problem in planned(*settings)["problems"]}
    assert "`weight`" in remedies["warmup: no document can be drawn"]


def test_the_tokenizers_vocabulary_is_what_counts() -> None:
    found = planned("model=small", "--config-only")
    assert found["parameters"]["embedding"] == 4096 * 640
    [problem] = found["problems"]
    assert problem["says"].startswith("model.vocab_size=16,384 is not what will be trained")
    assert planned("model=small", "data.vocab_size=16384", "--config-only")["problems"] == []


def test_tables_are_as_wide_as_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = within("plan", "experiment=demo", "--config-only", "--price", "2")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 100
    for said in ("Parameters, exact", "ZeRO-1 (chosen)", "price, 2 a rank and hour", "bank's generations"):
        assert said in done.out


def test_the_resolved_configuration_has_every_key_and_says_what_was_set() -> None:
    settings = [
        "experiment=quick",
        "seed=3",
        "continual.memory.query=previous",
        "+warmup.weights.factbook=0.5",
    ]
    config = compose_config([*settings, "model=nano"])
    shown = {
        f"{name}.{each.text}".removeprefix("."): each.is_default
        for name, found in sections(config).items()
        for each in found
    }
    keys = [key.replace("weights.factbook", "weights") for key in flat(yaml.safe_load(to_yaml(config)))]
    assert sorted(text.partition("=")[0] for text in shown) == sorted(keys)
    said = {
        "seed=3",
        "continual.memory.query=previous",
        "warmup.weights={factbook:0.5}",
        "warmup.branch_from=null",
    }
    assert said <= shown.keys()
    assert [text for text in said if shown[text]] == ["warmup.branch_from=null"]
    assert not shown["data.sources.factbook.kind=factbook"]  # a key that must be set


def test_the_configuration_is_printed_as_it_will_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    said = within("plan", "model=small", "data.name=a-corpus", "--config-only").out.split()
    assert "vocab_size=4096" in said  # the tokenizer's, not the 16,384 of model=small
    assert "vocab_size=16384" not in said
    assert said[said.index("data.sources.factbook") :][:2] == ["data.sources.factbook", "kind=factbook"]
    assert "name=a-corpus" in said
    data = said[said.index("name=a-corpus") : said.index("data.sources.factbook")]
    assert data[:3] == ["name=a-corpus", "|", "path=null"]  # what is a default shows without colours, too


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mfu", "0"), "--mfu 0.0 is no share"),
        (("--price", "-1"), "--price -1.0 is not above 0"),
        (("--tflops", "0"), "--tflops 0.0 is not above 0"),
        (("--references", "none"), "--references none is no number"),
        (("warmup.stepz=3",), "warmup.stepz"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], said: str) -> None:
    done = within("plan", *arguments, "--config-only")
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "GeForce RTX 4090 Laptop GPU"),
        ("NVIDIA GH200 480GB", "GH200 480GB"),
        ("NVIDIA RTX A1000", "RTX A1000"),
        ("Tesla V100-SXM2-32GB", "Tesla V100-SXM2-32GB"),
    ],
)
def test_devices_are_read_from_the_drivers_words(model: str, name: str, tmp_path: Path) -> None:
    assert device_here(tmp_path)[0] == "cpu"
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text(f"Model: \t\t {model}\nIRQ: 5\n")
    assert device_here(tmp_path) == (name, 2)


def test_a_gpu_that_is_not_known_is_planned_by_the_figures_that_are_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.plan.device_here", lambda: ("GeForce RTX 3090", 2))
    done = within("plan", "experiment=quick", "--config-only")
    assert done.code == 2
    assert "GeForce RTX 3090 are not known here; give --tflops X and --memory GIB" in done.err
    found = planned("experiment=quick", "--config-only", "--tflops", "71", "--memory", "23")
    assert found["site"]["device"]["name"] == "GeForce RTX 3090"
    memory = found["stages"][0]["memory"]["zero_1"]
    assert memory["resident"] == memory["total"]  # no heap of glibc's
    assert planned("experiment=quick", "--config-only", "--device", "h100")["problems"] == []


@pytest.mark.parametrize("prepared", [False, True])
def test_a_plan_takes_a_second_and_no_torch(prepared: bool) -> None:
    from tests.support.launch import prepared_root, run_settings

    settings = (
        run_settings(prepared_root(), "unsearched") if prepared else ["experiment=demo", "--config-only"]
    )
    program = (
        "import sys, time; from launch.cli import main; main(['plan', *sys.argv[1:]]);"
        "print(time.process_time(), sorted({'torch', 'faiss', 'datasets', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *settings],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, heavy = done.stdout.splitlines()[-1].split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < (1.5 if prepared else 1.0)
    assert ("are expected" in done.stdout.replace("\n", " ")) == prepared


def test_a_corpus_that_nobody_prepared_is_planned_within_five_seconds(tmp_path: Path) -> None:
    """Of the wall clock, the wait for a core that other processes hold taken off."""
    program = (
        "import sys, time; from pathlib import Path; from launch.cli import main;"
        "code = main(['plan', 'experiment=demo', 'paths.root=' + sys.argv[1]]);"
        "passed = time.monotonic() - float(sys.argv[2]); held = Path('/proc/self/schedstat');"
        "waited = int(held.read_text().split()[1]) / 1e9 if held.exists() else 0.0;"
        "print(code, passed - waited, time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "runs"), str(time.monotonic())],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    code, seconds, worked = map(float, done.stdout.splitlines()[-1].split())
    assert code == 0
    assert worked < 2.5  # of a core: half of it
    assert seconds < 5.0
    assert "tokens/s" in done.stdout
    assert not (tmp_path / "runs").exists()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
