"""Reports: their numbers are the evaluation's, their masks the model's, and every kind of run has one."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from featcache.errors import DataError, UsageError
from slotlab.commands import report
from slotlab.commands.tables import scores_table
from slotlab.masks.labels import masks_to_labels
from slotlab.models.base import Model, Output
from slotlab.models.pixel_model import PixelModel
from slotlab.models.randomness import Draws
from slotlab.models.slot_model import SlotModel
from slotlab.report.charts import thinned
from slotlab.report.gather import gather, names
from slotlab.report.options import PageOptions
from slotlab.report.server import LiveReport, serve
from slotlab.report.views import Views, frame_indices, packed, quantised
from slotlab.report.write import Extras, write_report
from slotlab.runs import checkpoint
from slotlab.runs.loaded import load_run
from slotlab.scoring.evaluate import evaluate
from slotlab.scoring.evaluation import Evaluation
from slotlab.scoring.follow import Followed
from slotlab.scoring.metrics import shown, shown_of_videos
from slotlab.scoring.over_frames import identity_switches, over_videos, slot_persistence, trace
from tests.reporting import NoMasks, disc_store, make_run
from tests.synthetic import DiscSource, make_store


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and two runs, one of features and one of pixels."""
    folder = tmp_path_factory.mktemp("runs")
    store = disc_store(folder / "discs.zarr")
    make_run(folder / "features", store)
    make_run(folder / "pixels", store, "pixel")
    return folder


class Page(HTMLParser):
    """What a page shows and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.values: dict[str, list[list[float]]] = {}  # table -> row -> numbers
        self._table = ""
        self.feed(text)
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert data
        self.data: dict[str, Any] = json.loads(data[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [v for k in ("src", "href", "data", "action") if (v := found.get(k)) and v[0] != "#"]
        if tag == "table":
            self._table = found.get("id") or ""
        elif tag == "tr":
            self.values.setdefault(self._table, []).append([])
        elif tag == "td" and "data-value" in found:
            self.values[self._table][-1].append(float(found["data-value"] or "nan"))

    @property
    def numbers(self) -> dict[str, list[list[float]]]:
        return {table: [row for row in rows if row] for table, rows in self.values.items()}


def unpacked(text: str, dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text), -15), dtype)


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_shows_the_numbers_of_eval(home: Path, tmp_path: Path) -> None:
    summary = write_report([home / "features", home / "pixels"], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    keys = (*shown("summary"), *shown_of_videos("summary"), "effective_slots", "mask_similarity")
    for row, name, found in zip(page.numbers["table-summary"], ("features", "pixels"), summary["runs"], strict=False):
        expected = json.loads(json.dumps(evaluate(load_run(home / name)).as_dict()))
        assert row == [expected[key] for key in keys]
        assert found["evaluation"] == expected == json.loads((home / name / "eval-validation.json").read_text())
    materials = page.numbers["table-by_material"]
    metal = summary["runs"][0]["evaluation"]["by_material"]["metal"]
    assert materials[0] == [*(metal[key] for key in shown("parts")), metal["frames"]]
    assert page.loads == ["data:,"]


def kept_scores(run: Path) -> Evaluation:
    """What a report shows of a run."""
    found = gather([run]).runs[0].evaluation
    assert found
    return found


@pytest.mark.slow
def test_scores_are_taken_from_the_file_only_while_they_are_the_checkpoints(home: Path) -> None:
    file = home / "features" / "eval-validation.json"
    gather([home / "features"])
    marked = json.loads(file.read_text()) | {"mbo": 0.125}
    file.write_text(json.dumps(marked))
    assert kept_scores(home / "features").as_dict() == marked

    file.write_text(json.dumps(marked | {"step": 3}))
    again = kept_scores(home / "features")
    assert again.values["mbo"] != 0.125 and again.step == 6

    file.write_text(json.dumps(marked | {"code": "0" * 12}))
    again = kept_scores(home / "features")
    assert again.values["mbo"] != 0.125, "other sources made these scores"

    file.write_text(json.dumps(marked))
    state = checkpoint.folder(home / "features") / "state.json"
    os.utime(file, (0, state.stat().st_mtime - 60))
    assert kept_scores(home / "features").values["mbo"] != 0.125


def test_curves_over_frames_average_to_the_score(home: Path) -> None:
    run = gather([home / "features"]).runs[0]
    assert run.evaluation
    for key in ("fg_ari", "mbo"):
        curve = run.curves[key]
        assert len(curve.mean) == 6 and list(curve.videos) == [4, 4, 4, 4, 2, 1]
        mean = np.average(curve.mean, weights=curve.videos)
        assert mean == pytest.approx(run.evaluation.values[key], abs=1e-12)
        assert (curve.low <= curve.high).all()


def test_identity_switches_count_objects_whose_slot_changed() -> None:
    slots = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 2], [-1, -1]])  # of two objects
    expected = [np.nan, 0.0, 1.0, 0.5, np.nan]
    assert np.array_equal(identity_switches(slots).numpy(), expected, equal_nan=True)
    assert identity_switches(slots[:0]).shape == (0,)


def test_slot_persistence_leaves_empty_slots_out() -> None:
    slots = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 2.0]]])
    assert torch.allclose(slot_persistence(slots)[1:], torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert slot_persistence(slots)[0].isnan()


def test_videos_of_one_frame_have_no_time(home: Path) -> None:
    loaded = load_run(home / "features")
    output = loaded.segment(loaded.store["validation"], 0)
    first = type(output)(
        **{
            name: getattr(output, name)[:1]
            for name in ("slots", "attention", "logits", "masks", "reconstruction", "target")
        },
        grid=output.grid,
    )
    curves = over_videos([trace(Followed(0, first, "decoder"))])
    assert np.isnan(curves["slot_persistence"].mean).all() and "fg_ari" not in curves


# --- one pass ------------------------------------------------------------------------------------------------


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the number of frames of every pass of a model over a video."""
    seen: list[int] = []
    for kind in (SlotModel, PixelModel):

        def counted(self: Model, features: torch.Tensor, draws: Draws, segment: Any = kind.segment) -> Output:
            seen.append(len(features))
            return segment(self, features, draws)

        monkeypatch.setattr(kind, "segment", counted)
    return seen


@pytest.mark.slow
def test_a_report_runs_each_model_once_over_each_video(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For scores, curves, gallery and figures together, whether the scores are there or not."""
    seen, runs = passes(monkeypatch), [home / "features", home / "pixels"]
    for run in runs:
        (run / "eval-validation.json").unlink(missing_ok=True)
    for extras in (Extras(figures=tmp_path / "figures"), None):  # without scores that are kept, and with them
        seen.clear()
        write_report(runs, tmp_path / "r.html", extras=extras, options=PageOptions(videos=3))
        assert seen == [4, 6, 4, 5] * 2


@pytest.mark.slow
def test_a_gallery_chosen_on_the_way_is_that_of_the_scores(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never more is kept of videos than the gallery has."""
    most: list[int] = []
    add = Views.add
    monkeypatch.setattr(Views, "add", lambda self, followed: (add(self, followed), most.append(len(self.result()))))
    for count in (0, 1, 2, 3, 9):
        options, found = PageOptions(videos=count, rank="fg_ari"), []
        for kept in (False, True):
            if not kept:
                (home / "features" / "eval-validation.json").unlink(missing_ok=True)
            run = gather([home / "features"], options=options).runs[0]
            found.append((run.choices, {video: view.packed for video, view in run.views.items()}))
        assert found[0] == found[1]
        assert set(found[0][1]) == {choice.video for choice in found[0][0]} and len(found[0][1]) == min(count, 4)
        assert max(most) <= count
        most.clear()


# --- pictures -----------------------------------------------------------------------------------------------


def test_the_gallery_holds_the_masks_of_the_model(home: Path, tmp_path: Path) -> None:
    write_report([home / "features", home / "pixels"], tmp_path / "r.html", options=PageOptions(videos=4))
    page = Page((tmp_path / "r.html").read_text())
    run = gather([home / "features"]).runs[0]
    assert run.loaded and run.evaluation
    by_id = {row.id: video for video, row in run.split.manifest.items()}
    for card in page.data["cards"]:
        view = card["runs"][0]
        masks = run.loaded.segment(run.split, by_id[card["id"]]).masks_on_grid
        shape = (len(card["indices"]), view["slots"], *view["grid"])
        codes = unpacked(view["masks"], "<u2").reshape(shape) / 65535
        low, high = np.array(view["ranges"]).T.reshape(2, -1, 1, 1, 1)
        found = torch.from_numpy(low + codes * (high - low))
        assert torch.allclose(found.float(), masks, atol=1 / 65535)
        size = (card["size"][0], card["size"][1])
        same = masks_to_labels(found, size) == masks_to_labels(masks, size)
        assert same.double().mean() > 0.999
        truth = unpacked(card["truth"], "u1").reshape(-1, *size)
        assert np.array_equal(truth, run.split.segmentations(by_id[card["id"]]))
        assert [len(r["slots"] * [0]) for r in card["runs"]] == [5, 4]  # both runs share the frames


def test_the_worst_videos_come_first(home: Path, tmp_path: Path) -> None:
    write_report([home / "features"], tmp_path / "r.html", options=PageOptions(videos=3, rank="fg_ari"))
    cards = Page((tmp_path / "r.html").read_text()).data["cards"]
    scores = [card["runs"][0]["scores"]["fg_ari"] for card in cards]
    by_video = json.loads((home / "features" / "eval-validation.json").read_text())["by_video"]
    ranked = sorted(item["fg_ari"] for item in by_video.values())
    assert [card["why"] for card in cards] == ["worst", "worst", "best"]
    assert scores == [ranked[0], ranked[1], ranked[-1]]


def test_an_unknown_score_to_rank_by_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--rank mbq: no such score; choose one of fg_ari, mbo, miou, ari"):
        PageOptions(rank="mbq")


@given(st.integers(1, 500), st.integers(1, 60))
def test_frames_are_thinned_evenly(frames: int, most: int) -> None:
    kept = frame_indices(frames, most)
    assert kept[0] == 0 and 1 <= len(kept) <= most and kept[-1] < frames
    assert len(set(np.diff(kept).tolist())) <= 1


@pytest.mark.parametrize("width", [1.0, 1e-4])
def test_quantised_masks_keep_their_order_however_flat(width: float) -> None:
    masks = torch.stack([torch.linspace(0.25, 0.25 + width, 200), torch.linspace(0, 1, 200)]).reshape(2, 1, 200)
    for bits, dtype in ((8, "u1"), (16, "<u2")):
        codes, ranges = quantised(masks, bits)
        assert np.array_equal(unpacked(packed(codes), dtype).reshape(codes.shape), codes)
        assert (np.diff(codes[:, 0].astype(int)) > 0).all() and codes.max() == 2**bits - 1
        assert np.allclose(ranges, [[0.25, 0.25 + width], [0, 1]])
    flat, _ = quantised(torch.full((1, 2, 3), 0.5), 16)
    assert not flat.any()


@pytest.mark.slow
def test_figures_and_markdown_are_written(home: Path, tmp_path: Path) -> None:
    extras = Extras(tmp_path / "paper" / "report.md", tmp_path / "paper" / "figures")
    summary = write_report([home / "features"], tmp_path / "report.html", extras=extras, options=PageOptions(videos=2))
    text = extras.markdown.read_text() if extras.markdown else ""
    assert f"{summary['runs'][0]['evaluation']['fg_ari']:.3f}" in text
    assert "](figures/time.png)" in text and len(summary["figures"]) == 4
    for path in map(Path, summary["figures"]):
        assert path.read_bytes().startswith(b"\x89PNG") and b"<svg" in path.with_suffix(".svg").read_bytes()
    widths = {line.count("|") for line in text.split("## ")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1  # every line of a table has as many cells


# --- every kind of run --------------------------------------------------------------------------------------


def test_without_masks_slots_are_shown_without_scores(tmp_path: Path) -> None:
    store = make_store(tmp_path / "bare.zarr", NoMasks({"train": (4, 3), "validation": (4, 4, 4)}))
    run = make_run(tmp_path / "bare", store)
    summary = write_report([run], tmp_path / "r.html", options=PageOptions(videos=2))
    page = Page((tmp_path / "r.html").read_text())
    assert summary["runs"][0]["evaluation"] is None and not (run / "eval-validation.json").exists()
    assert [(card["truth"], card["why"], card["kind"]) for card in page.data["cards"]] == [(None, "", "")] * 2
    assert set(summary["runs"][0]["by_frame"]) >= {"slot_persistence", "effective_slots"}
    assert len(page.numbers["table-summary"][0]) == 2  # the diagnostics


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1, 2, 1, 1)])
def test_single_images_have_no_scores_of_videos(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    """They would be those of the frames again. One video among the images has them shown."""
    store = make_store(tmp_path / "images.zarr", DiscSource({"train": lengths, "validation": lengths}))
    run = make_run(tmp_path / "images", store)
    write_report([run], tmp_path / "r.html")
    shown = "FG-ARI video" in (tmp_path / "r.html").read_text()
    console = Console(width=120, file=StringIO())
    console.print(scores_table(Evaluation.from_dict(json.loads((run / "eval-validation.json").read_text()))))
    text = console.file.getvalue()
    assert shown == ("per video" in text) == (sum(lengths) > len(lengths))
    assert ("5 frames of 4 videos" if shown else "4 images") in text


def test_a_run_without_a_checkpoint_has_its_curves(home: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    for name in ("config.toml", "store.json", "metrics.jsonl"):
        (young / name).write_bytes((home / "features" / name).read_bytes())
    summary = write_report([young, home / "features"], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert summary["runs"][0]["step"] is None and "no checkpoint yet" in text and "chart-train-loss" in text
    assert [run["run"] for run in Page(text).data["cards"][0]["runs"]] == [1]


def test_what_is_no_run_is_refused(tmp_path: Path, home: Path) -> None:
    with pytest.raises(DataError, match="not a run"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UsageError, match="nothing to report"):
        write_report([], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_report([home / "features"], tmp_path / "file" / "r.html")


def test_a_title_is_text(home: Path, tmp_path: Path) -> None:
    title = "</script><img src=x onerror=alert(1)>"
    write_report([home / "features"], tmp_path / "r.html", options=PageOptions(title=title, videos=1))
    assert "<img" not in (tmp_path / "r.html").read_text()


def test_runs_have_the_shortest_names_that_differ() -> None:
    assert names([Path("/a/x/seed0"), Path("/a/y/seed0")]) == ["x/seed0", "y/seed0"]
    assert names([Path("/a/one"), Path("/a/two")]) == ["one", "two"]
    assert len(set(names([Path("/a/one"), Path("/a/one")]))) == 2


# --- charts -------------------------------------------------------------------------------------------------


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(float(n), float(n % 7)) for n in range(5000)]
    found = thinned(points)
    assert len(found) <= 400 and found[0] == points[0] and found[-1] == points[-1]


# --- commands -----------------------------------------------------------------------------------------------


def test_the_command_prints_a_summary(home: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report.report)
    asked = [str(home / "features"), "-o", str(tmp_path / "r.html"), "--videos", "2", "--json"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["bytes"] == (tmp_path / "r.html").stat().st_size and found["runs"][0]["finished"]


def get(address: str, host: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.mark.slow
def test_a_served_report_follows_its_run(tmp_path: Path) -> None:
    store = disc_store(tmp_path / "discs.zarr")
    run = make_run(tmp_path / "live", store, steps=4)
    live = LiveReport([run], options=PageOptions(videos=1))
    live.refresh()
    with serve(live, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            before, page = json.loads(get(f"{address}/state")[1]), get(f"{address}/")[1]
            assert ("data-live" in page and "step 4" in page) or "4 steps" in page
            assert get(f"{address}/state", host="evil.example")[0] == 403
            assert get(f"{address}/../etc/passwd")[0] == 404

            with (run / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"step": 5, "loss": 0.75}) + "\n")
            logged = json.loads(get(f"{address}/state")[1])
            assert logged["training"] != before["training"] and logged["page"] == before["page"]
            assert "0.75" in get(f"{address}/training")[1]

            state = checkpoint.folder(run) / "state.json"
            os.utime(state, (time.time() + 5, time.time() + 5))
            live.refresh()
            assert json.loads(get(f"{address}/state")[1])["page"] != before["page"]
            with pytest.raises(UsageError, match="--port"):
                serve(live, server.server_port)
        finally:
            server.shutdown()


@pytest.mark.slow
def test_view_ends_cleanly_at_ctrl_c(home: Path) -> None:
    code = "import typer; from slotlab.commands.report import view; typer.run(view)"
    asked = [sys.executable, "-c", code, str(home / "features"), "--port", "0", "--no-browser", "--videos", "1"]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        address = process.stdout.readline().split()[0]
        try:
            assert get(address)[0] == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()
