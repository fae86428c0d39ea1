"""Charts: one layout for pages and files, its ticks, and what a reader finds in the pixels."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from featcache.errors import DataError, UsageError
from featcache.moments import Moments
from featcache.scale.quantities import scale_report
from featcache.scale.report import StoreReport
from slotlab.pictures import palette
from slotlab.pictures.chart import Chart, Series, labels, page_svg, save, ticks
from slotlab.report.charts import scale_charts

ROOT = Path(__file__).parent.parent
NAN = float("nan")


def paths(svg: Element, colour: str) -> list[str]:
    return [mark.attrib["d"] for mark in svg.iter() if mark.tag.endswith("path") and mark.get("stroke") == colour]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    found = ticks(low, low + width, count, log=False)
    slack = 1e-6 * (abs(low) + width)
    assert 1 <= len(found) <= count + 1
    assert all(low - slack <= value <= low + width + slack for value in found) and found == sorted(found)
    assert len(set(labels(found))) == len(found)


def test_tick_labels_are_short() -> None:
    assert labels([0.0, 0.00025, 0.0005]) == ["0", "2.5e-4", "5e-4"]
    assert labels([0.0, 0.25, 0.5, 1.0]) == ["0", "0.25", "0.5", "1"]
    assert labels([0.999926, 0.9999262]) == ["0.999926", "0.9999262"]
    assert labels([0, 50_000, 100_000, 2_500_000]) == ["0", "50k", "100k", "2.5M"]


def test_a_chart_breaks_at_what_is_not_defined() -> None:
    svg = fromstring(page_svg(Chart("k", "T", "", "x", (Series(0, "a", [0, 1, 2, 3], [1.0, NAN, 2.0, 3.0]),))))
    (line,) = paths(svg, "var(--line-0)")
    assert line.count("M") == 2
    assert "No values" in page_svg(Chart("k", "T", "", "x", (Series(0, "a", [0], [NAN]),)))


def test_pages_and_files_are_drawn_alike_in_colours_of_their_own(tmp_path: Path) -> None:
    """The same outlines, moved to where the file has the chart; what a series is called stays text."""
    lines = tuple(Series(n, f"run <{n}> & $x$", [0, 1, 2], [n, n + 1.0, n]) for n in range(len(palette.LINES) + 1))
    chart = Chart("k", "T", "", "x", lines)
    save([chart], tmp_path / "c.svg")
    page, file = fromstring(page_svg(chart)), fromstring((tmp_path / "c.svg").read_text())
    for colour, literal in enumerate(palette.LINES):
        shown, kept = paths(page, f"var(--line-{colour})"), paths(file, literal)
        legend, kept = kept[: len(shown)], kept[len(shown) :]
        assert len(shown) == len(legend) == len(kept) == (2 if colour == 0 else 1)
        for one, other in zip(shown, kept, strict=True):
            moved = np.array(re.findall(r"[\d.]+", other), float) - np.array(re.findall(r"[\d.]+", one), float)
            assert np.ptp(moved[::2]) < 0.11 and np.ptp(moved[1::2]) < 0.11, "of one chart, to a digit"
    dashes = [m.get("stroke-dasharray") for m in page.iter() if m.get("stroke") == "var(--line-0)"]
    assert dashes == ["none", "6 4"], "a line that shares its colour with another is dashed"
    assert "run <0> & $x$" in [mark.text for mark in file.iter()]
    save([chart], tmp_path / "c.png")  # where $ does not begin a formula


def test_what_is_painted_lies_where_the_values_are(tmp_path: Path) -> None:
    """A level line at a quarter of the axis, in the pixels of the PNG."""
    line = Series(1, "a", [0, 1], [0.25, 0.25], [0.0, 0.0], [0.5, 0.5])
    save([Chart("k", "T", "why", "x", (line,), y_min=0.0, y_max=1.0)], tmp_path / "c.png", tmp_path / "c.svg")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    svg = fromstring((tmp_path / "c.svg").read_text())
    scale = len(pixels) / float(svg.attrib["height"])
    grid = sorted({float(d[1:].split("L")[0].split()[1]) for d in paths(svg, palette.LIGHT["rule"])})
    top, bottom = grid[0] * scale, grid[-1] * scale  # 1 and 0
    middle = pixels[:, pixels.shape[1] // 2]
    rows = np.flatnonzero(np.abs(middle - palette.rgb(palette.LINES[1])).sum(-1) < 30)
    assert rows.mean() == pytest.approx(bottom - 0.25 * (bottom - top), abs=1.5)
    tint = 255 - 0.12 * (255 - np.array(palette.rgb(palette.LINES[1])))  # the band, from 0 to 0.5
    band = np.flatnonzero(np.abs(middle - tint).sum(-1) < 12)
    assert band.min() == pytest.approx(bottom - 0.5 * (bottom - top), abs=2)
    assert band.max() == pytest.approx(bottom, abs=3)  # below the line of the axis


def test_files_by_suffix_and_a_bad_name_is_refused(tmp_path: Path) -> None:
    charts = [Chart(str(n), "T", "w " * 60, "x", (Series(0, "a", [1, 10], [1, 100]),), True, True) for n in range(4)]
    save(charts, *(tmp_path / f"c.{suffix}" for suffix in ("png", "svg", "pdf")))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UsageError, match="cannot draw there"):
        save(charts, tmp_path / "c.xyz")
    for wrong in ("c.png/c.png", "c.png/c.svg"):
        with pytest.raises(DataError, match="cannot write"):
            save(charts, tmp_path / wrong)


def test_the_scale_of_stores_is_drawn_with_its_marks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    reports = []
    for scale, dim in ((1.0, 8), (20.0, 300)):
        tokens = scale * torch.randn(17, 5, dim, generator=generator)
        report = scale_report(Moments.from_tokens(tokens))
        reports.append(StoreReport("cache/same.zarr", "train", "b", "block12", report))
    channels, norms, spectrum = charts = scale_charts(reports)
    for report, channel, norm, directions in zip(reports, channels.series, norms.series, spectrum.series, strict=True):
        assert (min(channel.y), max(channel.y)) == (report.scale.channel_std.min, report.scale.channel_std.max)
        assert norm.y[int(np.argmin(np.abs(np.array(norm.x) - 50)))] == pytest.approx(report.scale.token_norm.p50)
        assert directions.dot == report.scale.effective_rank and directions.x[:3] == [1, 2, 3]
    save(charts, tmp_path / "scale.svg")
    text = (tmp_path / "scale.svg").read_text()
    assert text.count("same.zarr · block12") == 2, "stores of one name are still two lines"
    constant = StoreReport("c.zarr", "train", "b", "t", scale_report(Moments.from_tokens(torch.ones(2, 3, 4))))
    save(scale_charts([constant]), tmp_path / "constant.png")


def test_colours_stand_in_the_palette_alone() -> None:
    files = [
        f
        for kind in ("*.py", "*.css", "*.js", "*.j2")
        for p in ("featcache", "slotlab")
        for f in (ROOT / p).rglob(kind)
    ]
    assert len(files) > 100
    found = [file.name for file in files if re.search(r"#[0-9a-fA-F]{6}\b", file.read_text())]
    assert found == ["palette.py"]


# How colours look without one kind of cone: Machado, Oliveira & Fernandes 2009, table of severity 1, for linear RGB.
SIGHT = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)
    ),
}  # fmt: skip


@pytest.mark.parametrize("lines", [palette.LINES, palette.LINES_ON_DARK], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_lines_are_told_apart(lines: tuple[str, ...], sight: str) -> None:
    colours = np.array([palette.rgb(line) for line in lines]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(SIGHT[sight]).T).clip(0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    pixels = Image.fromarray((255 * encoded).round().astype(np.uint8)[None])
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    light, *hue = np.moveaxis(np.array(ImageCms.applyTransform(pixels, to_lab))[0].astype(float), -1, 0)
    lab = np.stack([light * 100 / 255, *(np.where(axis > 127, axis - 256, axis) for axis in hue)], -1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e3 * np.eye(len(lines))
    assert apart.min() > 9, [lines[i] for i in np.unravel_index(apart.argmin(), apart.shape)]
