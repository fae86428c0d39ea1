"""The script for a GPU: figures stand beside those that were foretold for the same work, and what was found is kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.foretold import EXTRACTION, RESIDENCES, Training, foretold, stream_key
from benchmarks.gpu import FORETOLD, Figure, Findings, Part, Result, parsed, parts, run, table
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config, presets
from slotlab.planning import devices
from slotlab.planning.devices import DEVICES, present
from slotlab.training.cost import Cost, Work

CUDA = torch.device("cuda")
RATE = {
    "batch_size": 64,
    "samples_per_s": 640.0,
    "clip": 2,
    "bound": "compute",
    "peak_memory_bytes": 3 * 10**9,
    "flops_per_s": 1e12,
    "flop_utilisation": 0.3,
    "precision": "bfloat16",
    "wait_share": 0.0,
    "gpu_utilisation": None,
}
TOLD = {"key": "default:64:bfloat16", "seconds": 0.05, "frames_per_s": 2560, "memory_bytes": 2 * 10**9, "bound_by": "x"}


def script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def findings(folder: Path) -> Findings:
    return Findings(folder, "card", "machine")


def part_named(name: str, device: str = "cuda") -> Part:
    return next(part for part in parts(device, Path("a.zarr"), False) if part.name == name)


def figures(folder: Path, index: int) -> dict[str, Any]:
    kept = json.loads((folder / "gpu.json").read_text())["parts"][index]["figures"]
    return {figure["name"]: figure for figure in kept}


@pytest.mark.parametrize("name", ["train default, batch 64", "train default, batch 64, graphs"])
def test_a_training_stands_beside_the_plan_of_its_own_preset_batch_and_precision(tmp_path: Path, name: str) -> None:
    kept = findings(tmp_path)
    others = {key: TOLD | {"key": key, "seconds": 9} for key in ("default:256:bfloat16", "mix:64:bfloat16")}
    kept.keep(Result(FORETOLD, "", "done", found={TOLD["key"]: TOLD} | others))
    kept.keep(Result(name, "", "done", found={"patterns": [RATE]}), part_named(name))
    found = figures(tmp_path, 1)
    assert found["a step"]["measured"] == pytest.approx(0.1) and found["a step"]["ratio"] == pytest.approx(2)
    assert found["samples/s"]["ratio"] == pytest.approx(0.5)
    assert found["peak memory"]["ratio"] == pytest.approx(1.5)
    assert "nvidia-ml-py" in found["GPU busy"]["note"], "a figure that could not be had is said"
    assert "| | a step | 100 ms, bound by compute, foretold x | 50 ms | 2 |" in (tmp_path / "gpu.md").read_text()


def test_without_a_plan_what_was_measured_is_kept(tmp_path: Path) -> None:
    kept = findings(tmp_path)
    kept.keep(Result(FORETOLD, "", "cut off after 3 s"))
    name = "train default, batch 64"
    kept.keep(Result(name, "", "done", found={"patterns": [RATE]}), part_named(name))
    step = figures(tmp_path, 1)["a step"]
    assert step["measured"] == pytest.approx(0.1) and step["foretold"] is None is step["ratio"]


def test_on_a_cpu_the_process_is_not_taken_for_its_tensors(tmp_path: Path) -> None:
    found = {f.name: f for f in part_named("train default, batch 64", "cpu").figures({"patterns": [RATE]}, TOLD)}
    assert found["peak memory"].measured is None and found["peak memory"].foretold == TOLD["memory_bytes"]
    assert found["resident memory of the process"].measured == RATE["peak_memory_bytes"]


def test_streams_stand_beside_the_link_and_cold_reads_beside_the_disk(tmp_path: Path) -> None:
    rate = {"ratio": 1.0, "limit": "memory", "bytes_per_s": 6e9}
    names = ("read frames 1024", "stream frames 1024", "cold frames")
    told = {"bytes_per_s": 12e9, "cold_bytes_per_s": 3e9}
    ratios = [f.ratio for f in gpu.stream_figures({"patterns": [rate | {"name": name} for name in names]}, told)]
    assert ratios == [None, 0.5, 2.0]


@pytest.mark.slow
def test_a_part_that_is_cut_off_keeps_its_whole_lines(tmp_path: Path) -> None:
    lines = ["one", "two"]
    code = (
        "import json, time\n"
        f"for key in {lines}: print(json.dumps(dict(key=key, seconds=1)), flush=True)\n"
        "print('{\"key\": \"three', end='', flush=True); time.sleep(60)"
    )
    result = run(Part(FORETOLD, script(code), 3), 3)
    assert result.outcome == "cut off after 3 s" and list(result.found) == lines
    kept = findings(tmp_path)
    kept.keep(result)
    assert list(kept.foretold) == lines
    assert "cut off after 3 s" in (tmp_path / "gpu.md").read_text()


def test_a_part_that_fails_or_lacks_something_is_a_row(tmp_path: Path) -> None:
    kept = findings(tmp_path)
    failing = Part("fails", script("import sys; print('{'); sys.exit('too large for the card')"), 30)
    lacking = Part("lacks", script("raise SystemExit(1)"), 30, lacks="pytest")
    for part in (failing, lacking):
        kept.keep(run(part, 30), part)
    shown = (tmp_path / "gpu.md").read_text()
    assert "failed with exit code 1" in shown and "too large for the card" in shown
    assert "not run: pytest is not installed" in shown


def test_json_of_one_object_is_whole_or_nothing() -> None:
    assert parsed('{\n "patterns": [1]\n}') == {"patterns": [1]}
    assert parsed('{\n "patterns": [1') == {} == parsed("a line") == parsed("3\n[4]")
    assert parsed('{"key": "a"}') == {"a": {"key": "a"}}


def test_cells_hold_no_bar() -> None:
    rows = table("card", [Result("part", "", figures=[Figure("a | b", 1.0, 2.0, "s")])]).splitlines()
    assert all(row.count("|") == 6 for row in rows if row.startswith("|"))


def test_every_training_has_a_plan_and_the_first_batches_come_first() -> None:
    ladder = [*gpu.ladder("cuda", False)]
    assert {training.preset for training, _ in ladder} <= set(presets())
    assert all(Training.of_key(training.key) == training for training, _ in ladder)
    firsts = len(gpu.LADDER)
    assert [graphs for _, graphs in ladder[: 2 * firsts]] == [False] * firsts + [True] * firsts
    assert len({(training.key, graphs) for training, graphs in ladder}) == len(ladder)
    command = part_named(FORETOLD).command
    assert {training.key for training, _ in ladder} <= set(command)


def test_a_trial_takes_every_training_shortened() -> None:
    short = [training for training, _ in gpu.ladder("cpu", True)]
    assert [training.preset for training in short] == [preset for preset, *_ in gpu.LADDER]
    for training in short:
        assert Training.of_key(training.key) == training
        assert load_config(training.preset, None, training.settings).optim.precision == "float32"
    commands = [part.command for part in parts("cpu", Path("a.zarr"), True) if part.key in {t.key for t in short}]
    assert [set(t.settings) <= set(command) for t, command in zip(short, commands, strict=True)] == [True] * len(short)


def test_a_card_is_known_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback = replace(DEVICES["rtx4090"], title="measured")
    monkeypatch.setattr(devices, "measured", lambda *_: fallback)
    monkeypatch.setattr(devices.Free, "now", lambda _: devices.Free(host=7, device=8))
    for card in DEVICES.values():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=card.cuda_name: name)
        assert present(CUDA) == replace(card, free=devices.Free(host=7, device=8))
    for name in ("NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert present(CUDA) is fallback


def test_the_plan_s_own_words(shared_store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps cost the same here: counting has its own tests."""
    step = Cost({Work(10**9, 10**6, torch.float32): 10}, peak=3 * 10**6, state=10**6, parameters=100)
    monkeypatch.setattr("slotlab.planning.plan.count_step", lambda *_, **__: step)
    monkeypatch.setattr("slotlab.planning.extraction.count_pass", lambda *_: step)
    monkeypatch.setattr(devices, "present", lambda *_: replace(DEVICES["rtx5090"], free=devices.Free(0, 32 * 10**9)))
    lines = {line["key"]: line for line in foretold(shared_store.path, "cpu", [Training("dinosaur", 4, "float32")])}
    assert {EXTRACTION, "dinosaur:4:float32", *map(stream_key, RESIDENCES)} <= lines.keys()
    seconds = 10 * 10**9 / 104.8e12 * 2
    assert lines["dinosaur:4:float32"]["seconds"] == pytest.approx(seconds)
    assert lines[stream_key("host")]["bytes_per_s"] == lines[stream_key("disk")]["bytes_per_s"] == 63e9
    assert lines[stream_key("device")]["bytes_per_s"] == 1792e9 / 2
    assert lines["dinosaur:4:float32"]["memory_bytes"] > step.peak, "with the batches and the resident features"
