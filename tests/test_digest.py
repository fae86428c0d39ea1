"""The digest that decides whether scores are kept: what code does moves it, words leave it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slotlab.scoring.digest import DECIDE, digest, scoring_code

SOURCE = '''"""What it is."""
from pydantic import Field

LIMIT = 0.1  # of something


class Section:
    """A section."""

    size: int = Field(3, description="Number of things")

    def half(self) -> float:
        """Half of it."""
        return self.size / 2
'''


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "room/inner").mkdir(parents=True)
    (tmp_path / "room/inner/part.py").write_text(SOURCE)
    return tmp_path / "room"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("# of something", "# of something else"),
        ('"""What it is."""\n', ""),
        ("A section.", "A part."),
        ('        """Half of it."""\n', "        # The half.\n\n"),
        ("Number of things", "Count of things"),
        ("size / 2", "size /  2"),
    ],
)
def test_words_leave_it(room: Path, before: str, after: str) -> None:
    found = digest([room])
    assert before in SOURCE
    (room / "inner/part.py").write_text(SOURCE.replace(before, after))
    assert digest([room]) == found


@pytest.mark.parametrize(
    ("before", "after"), [("LIMIT = 0.1", "LIMIT = 0.2"), ("Field(3", "Field(4"), ("size / 2", "size * 2")]
)
def test_what_the_code_does_moves_it(room: Path, before: str, after: str) -> None:
    found = digest([room])
    assert before in SOURCE
    (room / "inner/part.py").write_text(SOURCE.replace(before, after))
    assert digest([room]) != found


def test_a_new_file_moves_it(room: Path) -> None:
    found = digest([room])
    (room / "more.py").write_text("MORE = 1\n")
    assert digest([room]) != found
    assert digest([room / "more.py"]) != digest([room])


@pytest.mark.slow
def test_every_room_that_decides_numbers_is_in_it(tmp_path: Path) -> None:
    """A constant changed in any of their files is noticed."""
    for place in DECIDE:
        copy = tmp_path / place.name
        shutil.copytree(place, copy) if place.is_dir() else shutil.copy(place, copy)
        files = sorted(copy.rglob("*.py")) if copy.is_dir() else [copy]
        assert files
        for file in (files[0], files[-1]):
            before = digest([copy])
            file.write_text(file.read_text() + "\nADDED = 1\n")
            assert digest([copy]) != before
    assert {"collapse.py", "references.py"} <= {file.name for place in DECIDE for file in place.rglob("*.py")}


def test_it_is_made_once() -> None:
    scoring_code.cache_clear()
    found = scoring_code()
    assert len(found) == 12 and scoring_code() is found
