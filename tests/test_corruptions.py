"""The benchmark of small damages, with few of them, and that it would tell what it looks for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import corruptions
from benchmarks.corruptions import BAD, Reader, damaged, run, table
from benchmarks.readable import KINDS
from featcache.errors import DataError


@pytest.mark.slow
def test_a_few_of_every_kind(tmp_path: Path) -> None:
    reader = Reader(tmp_path, 1, KINDS)
    results = [reader.case(number) for number in range(2 * len(KINDS))]
    assert not [result for result in results if result.outcome in BAD]
    assert {result.kind for result in results} == {kind.name for kind in KINDS}
    assert sum(result.outcome == "refused" for result in results) > len(KINDS) // 2
    assert str(len(results)) not in table(results[:3])


def test_damage_is_small_and_the_same_for_a_seed() -> None:
    data = np.random.default_rng(0).bytes(1000)
    made = [damaged(data, np.random.default_rng((0, n))) for n in range(100)]
    assert made == [damaged(data, np.random.default_rng((0, n))) for n in range(100)]
    assert {what.split()[0] for _, what in made} == {"flipped", "cut", "zeroed", "swapped"}
    assert sum(changed != data for changed, _ in made) > 90


@pytest.mark.parametrize(
    ("reads", "outcome"),
    [
        (lambda found: found, "sound"),
        (lambda found: [found[0] ^ 1], "OTHER"),
        (lambda found: 1 / 0, "TRACEBACK"),
    ],
)
def test_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Any, outcome: str) -> None:
    """A reader that reads all, wrongly, or fails."""
    (kind,) = [kind for kind in KINDS if kind.name == "bmp"]
    reader = Reader(tmp_path, 0, [kind])
    reader.case(0)
    sound = next(iter(reader._sound.values()))[3]
    monkeypatch.setattr(corruptions, "read", lambda location: reads(sound))
    assert reader.case(1).outcome == outcome


def test_a_line_that_names_no_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kind,) = [kind for kind in KINDS if kind.name == "bmp"]
    reader = Reader(tmp_path, 0, [kind])
    reader.case(0)

    def read(location: Path) -> None:
        raise DataError("something is wrong")

    monkeypatch.setattr(corruptions, "read", read)
    assert reader.case(1).outcome == "TRACEBACK"


@pytest.mark.slow
def test_what_hangs_or_dies_is_ended_and_the_next_case_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corruptions, "work", _stuck)
    began = time.perf_counter()
    outcomes = [result.outcome for result in run([0, 1, 2], limit=0.5, start=5)]
    assert outcomes == ["TRACEBACK", "HANG", "TRACEBACK"] and time.perf_counter() - began < 60


def _stuck(link: Any, *_: Any) -> None:
    import os

    if link.recv() == 1:
        time.sleep(600)
    os._exit(11)
