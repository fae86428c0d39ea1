"""Names of any kind: as they are shown, as files are called, and through every command."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import DataError, IncompatibleError
from featcache.store.reading import FeatureStore
from featcache.text import bytes_text, file_name, printable
from tests.commands import Slotlab
from tests.media import save_movie
from tests.synthetic import DiscSource

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


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A folder of odd-named videos, masks and all."""
    folder = tmp_path / "videos"
    for split in ("train", "validation"):
        for index, name in enumerate(NAMES.values()):
            video = DiscSource({split: (2,) * len(NAMES)}).read(split, index)
            assert video.segmentations is not None
            for where, pictures in ((name, video.frames), (f"masks/{name}", video.segmentations)):
                (folder / split / where).mkdir(parents=True)
                for t, picture in enumerate(pictures):
                    Image.fromarray(picture).save(folder / split / where / f"{t}.png")
    save_movie(folder / "train" / f"{NAMES['not UTF-8']}.mp4", "libx264", np.zeros((2, 32, 32, 3), np.uint8))
    save_movie(folder / "train" / f"{NAMES['a protocol']}.mkv", "libx264", np.zeros((2, 32, 32, 3), np.uint8))
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("not UTF-8", "line break", "dash", "markup", "html")]
)
def test_through_every_command(slotlab: Slotlab, tmp_path: Path, videos: Path, name: str) -> None:
    home = tmp_path / NAMES[name]
    (home / NAMES[name]).parent.mkdir(parents=True)
    data, cache, run = home / NAMES[name], home / f"{NAMES[name]}.zarr", home / f"{NAMES[name]}run"
    videos.rename(data)

    def sound(*words: object) -> str:
        ended = slotlab(*words)
        assert ended.code == 0, ended
        ended.out.encode()
        return ended.out

    backbone = ("--backbone", "resnet18", "--weights", "random", "--tap", "layer1", "--input-size", 32)
    sound("extract", *backbone, "--data", data, "--out", cache, "--dry-run")
    sound("extract", *backbone, "--data", data, "--out", cache)
    store = FeatureStore.open(cache)
    names = set(store["train"].names.values())
    assert {NAMES[key] for key in NAMES} < names and len(names) == len(NAMES) + 2
    assert store.spec.source == str(data)
    sound("stats", cache, "--plot", home / "scale.png")
    settings = ("preset", "dinosaur"), ("steps", 2), ("batch-size", 2), ("set", "model.slots=3")
    words = [word for key, value in settings for word in (f"--{key}", value)]
    sound("train", "--cache", cache, *words, "--set", "model.slot_dim=8", "--out", run)
    scores = json.loads(sound("eval", run, "--json", "--sheet", home / "sheet.png"))
    assert set(scores["by_video"]) == set(store["validation"].names.values())
    sound("eval", run, "--against", run)
    page, tables, figures = home / "page.html", home / "page.md", home / "figures"
    sound("report", run, "--out", page, "--markdown", tables, "--figures", figures, "--videos", len(NAMES))
    assert not Tags(page.read_text("utf-8")).alarms and "<img src=x" not in page.read_text("utf-8")
    assert printable(NAMES["not UTF-8"]) in page.read_text("utf-8")
    assert "<script>" not in tables.read_text("utf-8")
    for form, files in (("png", 2 * len(NAMES)), ("rle", 1), ("overlay-gif", len(NAMES))):
        told = json.loads(sound("masks", run, "--out", home / form, "--format", form, "--json"))
        assert told["files"] == files == sum(p.is_file() for p in (home / form).rglob("*"))
    shown = [data / "train" / video for video in sorted(names)]
    sound("segment", run, *shown, "--out", home / "own", "--weights", "random")
    sound("verify", cache)
    sound("export", cache, home / "copy.h5", "--format", "hdf5")
    sound("import", home / "copy.h5", home / "back.zarr")
    back = FeatureStore.open(home / "back.zarr")["train"]
    assert back.names == store["train"].names
    sound("export", cache, home / "small.zarr", "--dtype", "int8")

    from slotlab.report.server import LiveReport

    live = LiveReport([run])
    live.refresh()
    assert printable(NAMES["not UTF-8"]) in live.page().encode().decode()
    (home / "a.toml").write_text('preset = "dinosaur"\nseeds = [0]\n[grid]\n"model.slots" = [2]\n')
    small = ("--steps", 1, "--set", "model.slot_dim=8", "--set", "optim.batch_size=2", "--workers", 1)
    sound("ablate", home / "a.toml", "--cache", cache, "--out", home / "ablation", *small)
    sound("table", home / "ablation")
    assert (home / "ablation" / "table.md").read_text("utf-8")

    missing = slotlab("stats", home / "gone")
    (line,) = missing.said.splitlines()
    assert missing.code == 3 and printable(str(home / "gone")) in line
