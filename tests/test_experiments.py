"""Many runs under one plan: the plan is checked first, nothing is done twice, and no run takes others down."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from featcache.errors import DataError, FeatcacheError, IncompatibleError, UsageError
from slotlab.commands.progress import RunsProgress
from slotlab.commands.tables import experiment_table
from slotlab.experiments import pool
from slotlab.experiments.ablation import read_ablation
from slotlab.experiments.execute import check_stores, conduct
from slotlab.experiments.plan import ERROR, PLAN, Plan, cell_name, opened, read_plan
from slotlab.experiments.table import build_table, to_csv, to_markdown
from tests.commands import Ended, Slotlab
from tests.synthetic import DiscSource, make_store

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

TINY = """
preset = "dinosaur"
cache = "synthetic.zarr"
seeds = 2
[set]
"model.slot_dim" = 8
"model.slots" = 4
"model.slot_mlp_hidden" = 16
"model.decoder.hidden" = 16
"optim.steps" = 60
"optim.batch_size" = 4
"optim.warmup_steps" = 0
log_every = 1
checkpoint_every = 4
[grid]
"model.decoder.mask_temperature" = [1.0, 0.5]
[[cells]]
name = "too fast"
"optim.learning_rate" = 1e30
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and the ablation above."""
    folder = tmp_path_factory.mktemp("place")
    make_store(folder / "synthetic.zarr")
    (folder / "tiny.toml").write_text(TINY)
    return folder


def start(place: Path, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()}")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def comparable(table: dict[str, Any]) -> list[Any]:
    """What two tables of one plan must agree in: all but where they are and how long it took."""
    dropped = ("seconds", "runs")
    states = [[(run["seed"], run["state"], run["error"]) for run in cell["runs"]] for cell in table["cells"]]
    return [states, [{k: v for k, v in cell.items() if k not in dropped} for cell in table["cells"]]]


@pytest.fixture(scope="module")
def unbroken(place: Path) -> dict[str, Any]:
    """Its table, carried out without a break."""
    with chdir(place):
        return conduct(read_ablation(Path("tiny.toml")), Path("whole"), RunsProgress(), workers=1)


@pytest.fixture
def ablate(slotlab: Slotlab, place: Path, monkeypatch: pytest.MonkeyPatch) -> Slotlab:
    """The command on the ablation above, which stands for the failing runs by its exit code."""
    monkeypatch.chdir(place)

    def run(out: str) -> Ended:
        ended = slotlab("ablate", "tiny.toml", "--out", out, "--workers", 1, "--json")
        assert ended.code == DataError.exit_code and "2 runs failed" in ended.said
        return ended

    return run


# -- plans -------------------------------------------------------------------------------------------------


def plan_of(tmp_path: Path, text: str, **more: Any) -> Plan:
    (tmp_path / "a.toml").write_text(text)
    return read_ablation(tmp_path / "a.toml", **{"cache": Path("s.zarr"), **more})


def test_a_grid_is_the_full_product_and_cells_come_after(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        """
        preset = "dinosaur"
        seeds = [3, 5]
        set.optim.steps = 40
        [grid]
        "model.slots" = [5, 7]
        model.decoder.mask_temperature = [1.0, 0.5, 0.3]
        [[cells]]
        [[cells]]
        name = "other model"
        preset = "default"
        """,
    )
    assert plan.seeds == (3, 5) and plan.split == "validation"
    assert len(plan.cells) == 8
    assert plan.cells[1].name == "slots=5,mask_temperature=0.5"
    assert plan.cells[1].settings == {"model.slots": 5, "model.decoder.mask_temperature": 0.5}
    found = {(c.config.model.slots, c.config.model.decoder.mask_temperature) for c in plan.cells[:6]}  # type: ignore[union-attr]
    assert found == {(s, t) for s in (5, 7) for t in (1.0, 0.5, 0.3)}
    assert [cell.name for cell in plan.cells[6:]] == ["base", "other_model"]
    assert plan.cells[7].config.model.kind == "clustering"
    assert all(cell.config.optim.steps == 40 and cell.cache == "s.zarr" for cell in plan.cells)
    runs = plan.runs(tmp_path)
    assert len({run.path for run in runs}) == 16 and [run.config.seed for run in runs[:9]] == [3] * 8 + [5]


def test_the_command_line_goes_before_the_base_and_the_cell_before_both(tmp_path: Path) -> None:
    text = '[set]\n"optim.steps" = 40\n"model.slots" = 3\n[[cells]]\n[[cells]]\n"model.slots" = 9\n"optim.steps" = 7'
    plan = plan_of(tmp_path, f'preset = "dinosaur"\n{text}', steps=20, overrides=["model.slots=5"], seeds=1, split="t")
    assert [(c.config.optim.steps, c.config.model.slots) for c in plan.cells] == [(20, 5), (7, 9)]
    assert plan.seeds == (0,) and plan.split == "t"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[grid]\n"model.slot" = [1]', "cell slot=1: .*model.slot: no such key; did you mean model.slots"),
        ('[grid]\n"model.slots" = [5, 0]', "cell slots=0: .*greater than or equal to 2"),
        ('[grid]\n"model.slots" = 5', "grid: model.slots: must be a list"),
        ('[grid]\n"model.slots" = []', "grid: model.slots: must be a list"),
        ("[cell]\nx = 1", "cell: no such key; there are: preset"),
        ('preset = "best"\n[[cells]]', "cell base: --preset best: unknown"),
        ('[grid]\nseed = [1, 2]', "seed: is not a key to vary"),
        ("seeds = 0\n[[cells]]", "must be at least 1"),
        ("seeds = [1, 1]\n[[cells]]", "one is named twice"),
        ('seeds = "3"\n[[cells]]', "seeds: write a number"),
        ("preset = 'default'", "at least one cell"),
        ("[[cells]]\n[[cells]]", "two cells are called base"),
        ('[cells]\nname = "a"', r"cells: must be a list of tables, each written as \[\[cells\]\]"),
        ("cells = [1]", "cells: must be a list of tables"),
        ('[grid]\n"data.eval_split" = ["validation", "test"]', "a table needs one split"),
    ],
)  # fmt: skip
def test_wrong_plans_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_of(tmp_path, text)


def test_a_plan_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no store; write cache ="):
        plan_of(tmp_path, "[[cells]]", cache=None)


def test_the_store_of_the_command_line_goes_before_the_base_and_the_cell_before_both(tmp_path: Path) -> None:
    text = 'cache = "file"\n[set]\ncache = "base"\n[[cells]]\n[[cells]]\ncache = "cell"'
    assert [cell.cache for cell in plan_of(tmp_path, text, cache=Path("line")).cells] == ["line", "cell"]
    assert [cell.cache for cell in plan_of(tmp_path, text, cache=None).cells] == ["base", "cell"]


def test_names_are_safe_for_files_and_distinct() -> None:
    assert cell_name(["a/b:c", "x=1.5"]) == "a_b_c,x=1.5"
    assert cell_name(["../.."]) not in ("", ".", "..", "../..")
    long = [cell_name(["k" * 300 + end]) for end in "ab"]
    assert len(set(long)) == 2 and max(map(len, long)) < 200


def test_stores_are_checked_before_anything_is_trained(tmp_path: Path, place: Path) -> None:
    cases: list[tuple[str, type[FeatcacheError], str]] = [
        ('cache = "none.zarr"', DataError, "cell base: none.zarr: no such store"),
        ('cache = "synthetic.zarr"\n[set]\ndata.tap = "block7"', IncompatibleError, "cell base: .*no tap 'block7'"),
        ('cache = "synthetic.zarr"\nsplit = "test"', UsageError, "cell base: .*no split 'test'"),
    ]
    for text, kind, message in cases:
        text = text.replace("synthetic.zarr", str(place / "synthetic.zarr"))
        with pytest.raises(kind, match=message):
            conduct(plan_of(tmp_path, f"{text}\n[[cells]]", cache=None), tmp_path / "out", RunsProgress())
        assert not (tmp_path / "out").exists()
    check_stores(read_ablation(place / "tiny.toml", cache=place / "synthetic.zarr"))


def test_an_ablation_scores_the_split_that_is_there(tmp_path: Path) -> None:
    def planned(*splits: str) -> Plan:
        path = tmp_path / f"{'-'.join(splits)}.zarr"
        make_store(path, DiscSource(dict.fromkeys(splits, (5, 6))))
        return plan_of(tmp_path, "[[cells]]", cache=path)

    plan = planned("train", "val")  # as published data sets call it
    assert plan.split == "val" and {cell.config.data.eval_split for cell in plan.cells} == {"val"}
    check_stores(plan)
    assert planned("train", "val", "validation").split == "validation"
    with pytest.raises(UsageError, match="no split 'vall'"):  # a name is taken at its word
        check_stores(plan_of(tmp_path, '[set]\ndata.eval_split = "vall"\n[[cells]]', cache=tmp_path / "train-val.zarr"))
    for splits in (("train",), ("train", "val", "test")):
        with pytest.raises(UsageError, match="no split 'validation'; choose one with --split: .*train"):
            check_stores(planned(*splits))


def test_another_plan_is_refused_and_more_of_the_same_is_not(tmp_path: Path) -> None:
    base = 'preset = "dinosaur"\nseeds = [0, 1]\n[grid]\n"model.slots" = [5, 7]\n'
    out = tmp_path / "out"
    first = plan_of(tmp_path, base)
    with opened(first, out), pytest.raises(DataError, match=r"another process \(pid"), opened(first, out):
        pass
    assert read_plan(out) == first
    for text, message in [
        (base + '[set]\n"optim.steps" = 9', "slots=5 optim.steps: 10000 then, 9 now"),
        (base.replace("5, 7", "5, 9"), "cell slots=7 then, not now"),
        (base.replace("[0, 1]", "[1, 2]"), "seeds 0 then, not now"),
        ('cache = "other.zarr"\n' + base, "slots=5 cache: s.zarr then, other.zarr now"),
    ]:
        plan = plan_of(tmp_path, text, cache=None if "other" in text else Path("s.zarr"))
        with pytest.raises(IncompatibleError, match=message), opened(plan, out):
            pass
        assert read_plan(out) == first
    more = plan_of(tmp_path, base.replace("[0, 1]", "3").replace("5, 7", "5, 7, 9"))
    with opened(more, out):
        assert read_plan(out) == more
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds other things"), opened(first, tmp_path / "full"):
        pass
    (out / PLAN).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_plan(out)
    with pytest.raises(DataError, match="no plan.json"):
        read_plan(tmp_path)


def test_processes_share_the_devices() -> None:
    assert pool.places("cpu", 3, 10) == ["cpu"] * 3
    assert pool.places("cpu", 3, 2) == ["cpu"] * 2
    assert pool.places("cpu,meta", None, 9) == ["cpu", "meta"]
    assert pool.places("cpu,meta", 3, 9) == ["cpu", "meta", "cpu"]
    for devices, workers in (("", None), ("quantum", None), ("cpu", 0)):
        with pytest.raises(UsageError, match="--workers 0|--devices? "):
            pool.places(devices, workers, 1)


# -- ablate ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_ablation_scores_every_cell_and_a_failing_one_stays(place: Path, unbroken: dict[str, Any]) -> None:
    *good, bad = unbroken["cells"]
    assert [cell["name"] for cell in unbroken["cells"]] == ["mask_temperature=1.0", "mask_temperature=0.5", "too_fast"]
    for cell in good:
        assert cell["finished"] == 2 and [run["state"] for run in cell["runs"]] == ["finished"] * 2
        for run, score in zip(cell["runs"], cell["fg_ari"]["values"], strict=True):
            evaluation = json.loads((place / run["path"] / "eval-validation.json").read_text())
            assert evaluation["fg_ari"] == score and evaluation["step"] == 60
        assert cell["fg_ari"]["min"] <= cell["fg_ari"]["mean"] <= cell["fg_ari"]["max"]
        assert cell["seconds"]["min"] > 0 and cell["loss"]["mean"] < 1.5
    assert good[0]["against_first"] is None
    assert good[1]["against_first"]["fg_ari"]["videos"] == 2
    assert bad["finished"] == 0 and bad["fg_ari"] is None
    assert all(run["state"] == "failed" and "not finite" in run["error"] for run in bad["runs"])
    error = json.loads((place / bad["runs"][0]["path"] / ERROR).read_text())["error"]
    assert error == bad["runs"][0]["error"] and "\n" not in error


@pytest.mark.slow
def test_the_table_is_made_again_from_the_folders_alone(
    place: Path, unbroken: dict[str, Any], slotlab: Slotlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    whole = place / "whole"
    texts = {name: (whole / name).read_text() for name in ("table.md", "table.csv")}
    for name in texts:
        (whole / name).unlink()
    moved = place / "elsewhere"
    whole.rename(moved)
    (place / "synthetic.zarr").rename(place / "away.zarr")
    try:
        assert comparable(slotlab("table", "elsewhere", "--json").json) == comparable(unbroken)
        assert (moved / "table.csv").read_text() == texts["table.csv"]
        assert (moved / "table.md").read_text().replace("elsewhere", "whole") == texts["table.md"]
    finally:
        moved.rename(whole)
        (place / "away.zarr").rename(place / "synthetic.zarr")
    rows = list(csv.DictReader(texts["table.csv"].splitlines()))
    assert float(rows[1]["fg_ari_mean"]) == unbroken["cells"][1]["fg_ari"]["mean"]
    assert rows[1]["model.decoder.mask_temperature"] == "0.5" and "not finite" in rows[2]["error"]
    assert "| too_fast | 0/2 (2 failed) | –" in texts["table.md"] and "p = " in texts["table.md"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(experiment_table(unbroken))
    shown = console.export_text()
    assert "too_fast" in shown and f"{unbroken['cells'][0]['mbo']['mean']:.3f}" in shown


@pytest.mark.slow
def test_broken_off_and_killed_it_ends_in_the_same_table(
    place: Path, unbroken: dict[str, Any], ablate: Slotlab
) -> None:
    args = ("ablate", "tiny.toml", "--out", "broken", "--workers", 1, "--json")
    out = place / "broken"
    first = out / "runs/mask_temperature=1.0-seed0"

    process = start(place, *args)  # ended in its first run, after a checkpoint
    until((first / "checkpoint/state.json").exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the same command resumes" in err and "Traceback" not in err
    assert not (first / "eval-validation.json").exists() and not (first / ERROR).exists()

    process = start(place, *args)  # killed in its second run, the first being finished
    second = out / "runs/mask_temperature=0.5-seed0"
    until((second / "checkpoint/state.json").exists, process)
    process.kill()
    process.communicate(timeout=60)
    time.sleep(1)  # its worker has noticed
    lines = (second / "metrics.jsonl").read_text()
    assert (first / "eval-validation.json").exists() and not (second / "eval-validation.json").exists()
    before = (first / "checkpoint/state.json").stat().st_mtime_ns
    time.sleep(0.5)
    assert (second / "metrics.jsonl").read_text() == lines, "a worker outlived its parent"

    ended = ablate("broken")
    assert "1 of 6 runs are finished" in ended.said
    assert comparable(ended.json) == comparable(unbroken)
    assert (first / "checkpoint/state.json").stat().st_mtime_ns == before, "a finished run was trained again"
    for run in (first, second):
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 61))


@pytest.mark.slow
def test_scores_by_other_sources_are_made_again_without_training(
    place: Path, unbroken: dict[str, Any], ablate: Slotlab
) -> None:
    run = place / "whole/runs/mask_temperature=1.0-seed0"
    path, log = run / "eval-validation.json", (run / "metrics.jsonl").read_text()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "other sources", "fg_ari": 0.123}))
    ended = ablate("whole")
    assert "3 of 6 runs are finished" in ended.said
    assert comparable(ended.json) == comparable(unbroken)
    assert (run / "metrics.jsonl").read_text() == log


def test_scores_whose_renewal_failed_are_not_shown_as_if_it_had_not(tmp_path: Path) -> None:
    run = plan_of(tmp_path, f"{TINY}").runs(tmp_path / "out")[0]
    run.path.mkdir(parents=True)
    steps = run.config.optim.steps
    run.evaluation.write_text(json.dumps({"step": steps - 1}))
    assert not run.finished  # somebody looked at it on the way
    run.evaluation.write_text(json.dumps({"step": steps}))
    assert run.finished and run.error is None
    run.fail("the checkpoint is of another model")
    assert not run.finished and run.error == "the checkpoint is of another model"


@pytest.mark.slow
def test_another_plan_is_refused_by_the_command(
    place: Path, unbroken: dict[str, Any], slotlab: Slotlab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    ended = slotlab("ablate", "tiny.toml", "--out", "whole", "--set", "model.slots=5")
    assert ended.code == IncompatibleError.exit_code and ended.out == ""
    assert "model.slots: 4 then, 5 now" in ended.said and len(ended.said.splitlines()) == 1


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_run_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    plan = read_ablation(place / "tiny.toml", seeds=1)
    killed = []

    class Watch(pool.Watcher):
        def started(self, run: Any) -> None: ...
        def ended(self, run: Any, error: str | None) -> None: ...
        def row(self, run: Any, row: dict[str, Any]) -> None:
            if row["step"] == 20 and not killed:
                killed.append(run.path.name)
                multiprocessing.active_children()[0].kill()

    out = tmp_path / "out"
    with opened(plan, out):
        pool.carry_out(plan.runs(out), ["cpu"], Watch())
    table = build_table(out)
    states = {cell["name"]: cell["runs"][0] for cell in table["cells"]}
    assert killed == ["mask_temperature=1.0-seed0"]
    assert "killed by SIGKILL" in states["mask_temperature=1.0"]["error"]
    assert states["mask_temperature=0.5"]["state"] == "finished"
    assert "not finite" in states["too_fast"]["error"]
    assert "killed by SIGKILL" in to_markdown(table) and "killed by SIGKILL" in to_csv(table)


def test_the_shipped_ablations_are_valid() -> None:
    files = sorted((ROOT / "docs/ablations").glob("*.toml"))
    assert files
    for file in files:
        plan = read_ablation(file)
        assert plan.cells[0].settings == {}, "the first is what the others are tested against"
