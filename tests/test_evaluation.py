"""What an evaluation finds: its JSON is a contract, and a metric is one entry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import DataError
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.metrics import SCORES, score_of, title_of
from tests.synthetic import DiscSource, make_store

MADE = Path(__file__).parent / "fixtures" / "v0.1"  # runs of version 0.1, and what it scored them
RUNS = ("default", "dinosaur", "pixel-small")
ADDED = {"floor_statistics"}  # keys since then


def kept(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MADE / run / "eval-validation.json").read_text())
    return found


def keys(found: Any) -> Any:
    """The keys at every depth."""
    return {key: keys(value) for key, value in found.items() if key not in ADDED} if isinstance(found, dict) else None


@pytest.mark.parametrize("run", RUNS)
def test_the_json_has_the_keys_that_it_had(tmp_path: Path, run: str) -> None:
    """And those added since. That the values are what they were is tested in test_earlier_versions.py."""
    made = shutil.copytree(MADE, tmp_path / "made")
    found = json.loads(json.dumps(evaluate(load_run(made / run)).as_dict(), allow_nan=False))
    assert keys(found) == keys(kept(run)) and found.keys() >= ADDED
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
from slotlab.experiments.table import COLUMNS, TESTED
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
    "evaluation": found.as_dict(), "terminal": console.file.getvalue(), "columns": [*COLUMNS], "tested": [*TESTED],
    "refined": list(outline_scores(loaded, None, "guided")["refined"]["gain"]),
    "look": list(look(loaded.model, loaded.config, loaded.store)),
}))
"""


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
