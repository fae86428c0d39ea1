"""What an evaluation finds: its JSON is a contract, and a metric is one entry."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from featcache.errors import DataError
from featcache.store.reading import FeatureStore
from slotlab.commands import terminal
from slotlab.commands.tables import scores_table
from slotlab.config.load import load_config
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.metrics import SCORES, score_of, title_of
from slotlab.scoring.references import FLOORS, KnownReferences
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.synthetic import DiscSource, fitted, make_store
from tests.training import rows_of, small

MADE = Path(__file__).parent / "fixtures" / "v0.1"  # runs of version 0.1, and what it scored them
RUNS = ("default", "dinosaur", "pixel-small")


def kept(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MADE / run / "eval-validation.json").read_text())
    return found


def lacking(found: Any, expected: Any, where: str = "") -> list[str]:
    """Keys of ``expected``, at any depth, that ``found`` has not."""
    if not isinstance(expected, dict):
        return []
    return [
        missing
        for key, value in expected.items()
        for missing in (lacking(found[key], value, f"{where}{key}.") if key in found else [f"{where}{key}"])
    ]


@pytest.mark.parametrize("run", RUNS)
def test_the_json_has_the_keys_that_it_had(tmp_path: Path, run: str) -> None:
    """And more. That the values are what they were is tested in test_earlier_versions.py."""
    made = shutil.copytree(MADE, tmp_path / "made")
    found = json.loads(json.dumps(evaluate(load_run(made / run)).as_dict(), allow_nan=False))
    assert lacking(found, kept(run)) == []
    assert Evaluation.from_dict(found).as_dict() == found


@pytest.mark.parametrize("run", RUNS)
def test_scores_of_an_earlier_version_are_read_and_kept_as_they_are(run: str) -> None:
    assert Evaluation.from_dict(kept(run)).as_dict() == kept(run)


def test_what_is_no_evaluation_is_told() -> None:
    for raw in ({}, {"run": "x"}, kept("dinosaur") | {"by_video": None, "resolution": 3}):
        with pytest.raises(DataError, match=r"eval.json: damaged, or of an earlier version"):
            Evaluation.from_dict(raw, "eval.json")


def test_names_in_json_have_titles() -> None:
    assert [title_of(name) for name in ("fg_ari", "ari", "fg_ari_video", "miou_small", "other")] == [
        "FG-ARI", "ARI", "FG-ARI video", "mIoU small", "other",
    ]  # fmt: skip
    assert score_of("mbo_video") is next(score for score in SCORES if score.key == "mbo")
    assert score_of("mbonus") is None


NEW_METRIC = """
import io, json, sys
from pathlib import Path
from slotlab.scoring import metrics
stray = lambda table, objects=None: table[:, 0].amax(-1).double() / table.sum((1, 2))  # largest share of background
places = metrics.EVERYWHERE
metrics.SCORES += (metrics.Score("stray", "Stray", stray, places, places, higher_is_better=False),)

from rich.console import Console
from slotlab.commands.tables import gains_table, paired_table, scores_table
from slotlab.experiments.outcome import SCORINGS
from slotlab.report.write import Extras, write_report
from slotlab.report.options import PageOptions
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.fine import outline_scores
from slotlab.scoring.paired import paired
from slotlab.training.look import look

folder = Path(sys.argv[1])
loaded = load_run(folder / "run", folder / "discs.zarr")
console = Console(width=200, file=io.StringIO())
found = Evaluation.from_dict(json.loads(json.dumps(evaluate(loaded).as_dict())))
console.print(scores_table(found), paired_table(paired(found, found)))
extras = Extras(folder / "report.md")
write_report([folder / "run"], folder / "report.html", cache=folder / "discs.zarr", extras=extras,
             options=PageOptions(videos=2, rank="stray"))
print(json.dumps({
    "evaluation": found.as_dict(), "terminal": console.file.getvalue(), "columns": [*SCORINGS["eval"].columns],
    "tested": [*SCORINGS["eval"].tested],
    "refined": list(outline_scores(loaded, None, "guided")["refined"]["gain"]),
    "look": list(look(loaded.model, loaded.config, loaded.store)),
}))
"""


@pytest.mark.slow
def test_a_new_metric_is_one_entry(tmp_path: Path) -> None:
    """It is in every number, table and page, and where low is good, low is best."""
    shutil.copytree(MADE / "dinosaur", tmp_path / "run")
    make_store(tmp_path / "discs.zarr", DiscSource({"train": (4, 4, 3, 4, 2), "validation": (4, 6, 4, 5)}))
    done = subprocess.run([sys.executable, "-c", NEW_METRIC, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    evaluation = found["evaluation"]
    for part in (evaluation, evaluation["decoder"], evaluation["reference"], evaluation["floor"]["kmeans_raw"],
                 evaluation["by_material"]["metal"], evaluation["by_objects"]["2"]):  # fmt: skip
        assert 0 < part["stray"] <= 1
    by_video = evaluation["by_video"]
    assert {"stray", "stray_metal", "stray_video"} <= next(iter(by_video.values())).keys()
    assert evaluation["confidence"]["stray"][0] <= evaluation["stray"] <= evaluation["confidence"]["stray"][1]
    assert found["terminal"].count("Stray") > 3 and "Stray metal" in found["terminal"]
    assert {"stray", "stray_video"} <= set(found["columns"]) and "stray" in found["tested"]
    assert "stray" in found["refined"] and {"eval_stray", "eval_stray_video"} <= set(found["look"])
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page.count(">Stray<") > 3 and "chart-time-stray" in page and "by Stray" in page
    assert "| Stray |" in next(line for line in text.splitlines() if line.startswith("| run |"))
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    assert ["stray", "Stray"] in data["scores"]
    worst, best = (card["runs"][0]["scores"]["stray"] for card in data["cards"])
    values = [of["stray"] for of in by_video.values()]
    assert (worst, best) == (max(values), min(values))


def test_evaluation_has_the_promised_keys(shared_run: Path) -> None:
    result = evaluate(load_run(shared_run)).as_dict()
    assert {
        "run", "cache", "split", "frames", "videos", "fg_ari", "ari", "mbo", "miou", "fg_ari_video", "mbo_video",
        "skipped_frames", "reference", "floor", "by_material", "mask_similarity", "slot_similarity",
    } <= result.keys()  # fmt: skip
    assert list(result["floor"]) == ["kmeans_raw", "kmeans_whitened", "tfs"]
    assert 0 < result["floor"]["tfs"]["mbo"] < 1
    assert set(result["by_material"]) == {"metal", "rubber"}
    assert {"fg_ari", "mbo"} <= result["reference"].keys()
    assert result["reference"]["mbo"] > 0.3  # a 4x4 grid
    json.dumps(result)


def test_all_floors_are_measured_where_asked_for(run: Path, slotlab: Slotlab) -> None:
    usual = json.loads(json.dumps(evaluate(load_run(run)).as_dict()))
    done = slotlab("eval", run, "--floors", "all", "--json", "--device", "cpu")
    found = done.json
    assert list(found["floor"]) == ["kmeans_raw", "kmeans_whitened", "tfs", "ncut"]
    assert {name: found["floor"][name] for name in usual["floor"]} == usual["floor"]
    assert found["floor"]["ncut"]["mbo"] > 0 and found | {"floor": 0} == usual | {"floor": 0}
    table = slotlab("eval", run, "--floors", "all", "--device", "cpu").out
    assert table.index("k-means") < table.index("training-free") < table.index("normalised")  # lines are broken


def test_floors_that_are_known_are_measured_again_where_more_are_asked_for(shared_run: Path) -> None:
    known: KnownReferences = {}
    loaded = load_run(shared_run)
    usual = evaluate(loaded, known=known).references
    assert evaluate(loaded, known=known).references is usual
    every = evaluate(loaded, known=known, floors="all").references
    assert list(every.floors) == [*FLOORS] and evaluate(loaded, known=known).references is every


def test_evaluation_repeats_itself(shared_run: Path) -> None:
    assert evaluate(load_run(shared_run)) == evaluate(load_run(shared_run))


def test_the_masks_that_a_run_publishes_are_scored_first(tmp_path: Path, store: FeatureStore) -> None:
    """And shown; the others are scored beside them. Training is the same."""
    runs = [
        train(small(f"published_masks={kind}", preset="dinosaur", optim__steps=3), store, tmp_path / kind)
        for kind in ("decoder", "attention")
    ]
    assert [row["loss"] for row in rows_of(runs[0])] == [row["loss"] for row in rows_of(runs[1])]
    found = [evaluate(load_run(run)) for run in runs]
    decoder, attention = (result.as_dict() for result in found)
    for kind in ("decoder", "attention"):
        assert decoder[kind] == attention[kind]
    for result in (decoder, attention):
        assert all(result[key] == value for key, value in result[result["published_masks"]].items())
    assert decoder["mbo"] != attention["mbo"]
    assert decoder["logit_std"] == attention["logit_std"]
    assert decoder["largest_activation"] != attention["largest_activation"]
    one, other = (load_run(run).segment(store["validation"], 0) for run in runs)
    assert torch.equal(other.masks, one.attention) and not torch.equal(other.masks, one.masks)
    shown = io.StringIO()
    Console(file=shown, width=100).print(scores_table(found[1]))
    assert "of the decoder" in shown.getvalue()


def test_more_slots_than_patches_are_scored(tmp_path: Path, store: FeatureStore) -> None:
    config = load_config("default", None, [*fitted("default"), "model.slots=20"], optim__steps=1)
    result = evaluate(load_run(train(config, store, tmp_path / "run")))  # of 16 patches
    assert result.summary.frames == 8 and result.references.floors["kmeans_raw"]["mbo"] > 0


def test_an_evaluation_warns_of_collapse(
    tmp_path: Path, store: FeatureStore, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small("model.decoder.mask_temperature=1e6", optim__steps=1)
    result = evaluate(load_run(train(config, store, tmp_path / "run")))
    assert "all slots have the same mask" in result.warnings[0]
    assert len(result.largest_activation_by_slot) == 4
    terminal.warn(result.warnings)
    told = capsys.readouterr()
    assert told.out == "" and "warning: all slots have the same mask" in told.err
