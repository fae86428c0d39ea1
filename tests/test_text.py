"""Names of any kind: as they are shown, as files are called, and through every command."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.backbones.backbone import load_backbone
from featcache.errors import DataError, IncompatibleError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources import Video, open_source
from featcache.store.reading import FeatureStore
from featcache.text import bytes_text, file_name, printable
from featcache.upkeep.verify import verify
from slotlab.experiments.plan import cell_name
from slotlab.experiments.table import TRAINING, write_table
from slotlab.pictures.frames import read_path
from slotlab.report.server import LiveReport
from tests.commands import Slotlab
from tests.media import save_movie
from tests.synthetic import DiscSource, make_store
from tests.training import small

NAMES = {
    "not UTF-8": os.fsdecode(b"caf\xe9 \xff"),
    "line break": "a\nb\r\tc",
    "quotes": 'it\'s "so" `pwd`',
    "backslash": "a\\b\\n",
    "dash": "-rf",
    "markup": "[bold red]x[/nope] :smile:",  # a folder in a folder
    "html": "<img src=x onerror=alert(1)><script>",
    "mathematics": "$\\frac{$ %s %d {x}",
    "emoji": "\U0001f98a\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "backwards": "\u202egnp.exe",
    "a protocol": "http:a",
    "Markdown": "a|b ![x](y) `c`",
    "long": "é" * 120,
}


@given(st.text(st.characters(exclude_categories=())))
def test_what_is_shown_is_one_line_of_utf8(text: str) -> None:
    shown = printable(text)
    assert shown.encode().decode() == shown == printable(shown)
    assert len(shown.splitlines()) <= 1 and "\x1b" not in shown and "\u202e" not in shown


def test_what_is_not_seen_is_escaped_and_the_rest_is_kept() -> None:
    assert printable(NAMES["not UTF-8"]) == r"caf\xe9 \xff"
    assert printable(NAMES["line break"]) == r"a\nb\r\tc"
    assert printable("\x1b[2J\u2028\ud83d") == r"\x1b[2J\u2028\ud83d"
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\r"
    for name in ("emoji", "html", "markup", "backslash"):
        assert printable(NAMES[name]) == NAMES[name]


@given(st.text(st.characters(exclude_categories=())))
def test_a_file_can_be_called_so(text: str) -> None:
    name = file_name(text)
    assert len(name.encode()) <= 210 and "/" not in name and name == file_name(name)
    assert len(Path("x" + name).parts) == 1


def test_long_names_stay_different() -> None:
    assert file_name("a" * 300) != file_name("a" * 301)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 MB"), (12_345, "0.0123 MB"), (999_000_000, "999 MB"), (999_600_000, "1.0 GB"), (14_500_000_000, "14.5 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_errors_stay_on_one_line() -> None:
    assert str(DataError("a\nb.png: damaged")) == r"a\nb.png: damaged"
    assert IncompatibleError("a\nb").render() == r"a\nb"


class Tags(HTMLParser):
    """Names of a page's tags, with what would run a script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.alarms: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.alarms += [tag for key, value in attrs if key == "onerror" or value == "x"]


class Named(DiscSource):
    """Videos that are called all of that."""

    def read(self, split: str, index: int) -> Video:
        return replace(super().read(split, index), id=list(NAMES.values())[index])


HOME = "".join((NAMES["not UTF-8"], NAMES["line break"], NAMES["markup"], NAMES["html"], NAMES["mathematics"]))


def test_a_folder_of_such_names(tmp_path: Path) -> None:
    """A store keeps them byte for byte, whatever the folder is called that they lie in."""
    folder = tmp_path / HOME
    for index, name in enumerate(NAMES.values()):
        video = DiscSource({"train": (2,) * len(NAMES)}).read("train", index)
        assert video.segmentations is not None
        for where, pictures in ((name, video.frames), (f"masks/{name}", video.segmentations)):
            (folder / where).mkdir(parents=True)
            for t, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / where / f"{t}.png")
    for clip in (f"{NAMES['not UTF-8']}.mp4", f"{NAMES['a protocol']}.mkv"):
        save_movie(folder / clip, "libx264", np.zeros((2, 32, 32, 3), np.uint8))
    source, backbone = open_source(folder), load_backbone("resnet18", "random", ("layer1",), 32)
    options = ExtractOptions(precision="float32")
    store = extract(plan(tmp_path / f"{NAMES['dash']}.zarr", source, backbone, options), source, backbone)
    names = set(store["train"].names.values())
    assert set(NAMES.values()) < names and len(names) == len(NAMES) + 2
    assert store.spec.source == str(folder) and verify(store.path) == []
    for name in names:
        assert len(read_path(folder / name)) == 2


@pytest.mark.slow
def test_through_the_commands(slotlab: Slotlab, tmp_path: Path) -> None:
    home = tmp_path / HOME
    home.mkdir(parents=True)
    cache, run, dash = home / f"{NAMES['dash']}.zarr", home / "run[/x]", NAMES["not UTF-8"]
    store = make_store(cache, Named({"train": (2,) * len(NAMES), "validation": (2,) * len(NAMES)}))
    names = store["validation"].names
    assert set(names.values()) == set(NAMES.values())

    def sound(*words: object) -> str:
        ended = slotlab(*words)
        assert ended.code == 0, ended
        ended.out.encode()
        return ended.out

    sound("stats", cache, "--plot", home / "scale.svg")
    (home / "c.toml").write_text(small(optim__steps=1).to_toml())
    sound("train", "--preset", "dinosaur", "--config", home / "c.toml", "--cache", cache, "--out", run)
    scores = json.loads(sound("eval", run, "--json", "--sheet", home / "sheet.png"))
    assert set(scores["by_video"]) == set(NAMES.values())
    sound("eval", run)
    page, tables = home / "page.html", home / "page.md"
    sound("report", run, "--out", page, "--markdown", tables, "--videos", len(NAMES))
    text = page.read_text("utf-8")
    assert not Tags(text).alarms and "<img src=x" not in text and printable(dash) in text
    assert "<script>" not in re.sub("`[^`]*`", "", tables.read_text("utf-8"))  # in code it is harmless
    for form, files in (("png", 2 * len(NAMES)), ("rle", 1)):
        told = json.loads(sound("masks", run, "--out", home / form, "--format", form, "--json"))
        assert told["files"] == files == sum(p.is_file() for p in (home / form).rglob("*"))
    picture = home / dash / f"{NAMES['line break']}.png"
    picture.parent.mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(picture)
    free = ("segment", "--no-training", "--backbone", "resnet18", "--weights", "random", "--input-size", 32)
    told = json.loads(sound(*free, picture, picture.parent, "--out", home / "segments", "--json"))
    assert told["files"] == 2 == sum(p.is_file() for p in (home / "segments").rglob("*"))
    sound("verify", cache)
    sound("export", cache, home / "copy.h5", "--format", "hdf5")
    sound("import", home / "copy.h5", home / "back.zarr")
    assert FeatureStore.open(home / "back.zarr")["validation"].names == names
    live = LiveReport([run])
    live.refresh()
    assert printable(dash) in live.page().encode().decode()
    missing = slotlab("stats", home / "gone")
    (line,) = missing.said.splitlines()
    assert missing.code == 3 and printable(str(home / "gone")) in line


def test_a_table_of_such_names(tmp_path: Path) -> None:
    cell = {"name": cell_name([HOME]), "settings": {"cache": HOME}, "finished": 0, "against_first": None}
    runs = [{"path": f"{tmp_path}/{HOME}", "state": "failed", "error": HOME}]
    cells = [{**dict.fromkeys(TRAINING), **cell, "runs": runs}]
    about = {"out": HOME, "split": "validation", "seeds": [0], "columns": TRAINING, "tested": {}}
    write_table({**about, "cells": cells}, tmp_path)
    assert printable(HOME) in (tmp_path / "table.md").read_text("utf-8")
    assert (tmp_path / "table.csv").read_text("utf-8").startswith("cell,cache")
