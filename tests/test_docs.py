"""The pages: links lead somewhere, commands are the command line's own, the reference of settings is the schema's."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

import cli
from featcache.errors import UsageError
from slotlab.config.reference import settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
SLOTLAB = typer.main.get_command(cli.app)
PLACEHOLDERS = re.compile(r"\b[NS]\b")  # of numbers


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[str]:
    """Every ``slotlab ...`` in a code block or a code span, without comments and the brackets of what is optional."""
    text = page.read_text()
    blocks = [part for block in FENCE.findall(text) for line in block.splitlines() for part in line.split("&&")]
    spans = [" ".join(span.split()) for span in re.findall(r"`(slotlab [^`]+)`", FENCE.sub("", text))]
    found = [line.strip().partition("  ")[0] for line in blocks if line.strip().startswith("slotlab ")] + spans
    return [PLACEHOLDERS.sub("1", re.sub(r"[\[\]]|\.\.\.", "", line)) for line in found]


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@pages
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    for line in commands(page):
        command, words = SLOTLAB, shlex.split(line, comments=True)[1:]
        while words and hasattr(command, "commands"):
            name = words.pop(0)
            assert name in command.commands, f"{page.name}: {line}"
            command = command.commands[name]
        try:
            command.make_context(line, words)
        except Exception as error:  # a code span may name a command without what it needs
            assert type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError"), f"{page.name}: {line}: {error}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:slotlab|featcache|benchmarks|docs)/[a-z_0-9/]+\.\w+|test_\w+\.py)`", page.read_text())
    for file in named:
        assert (ROOT / ("tests" if file.startswith("test_") else "") / file).exists(), f"{page.name}: {file}"


@pages
def test_imports_are_of_what_there_is(page: Path) -> None:
    for module, names in re.findall(r"^from ((?:slotlab|featcache)[\w.]*) import ([\w, ]+)", page.read_text(), re.M):
        found = importlib.import_module(module)
        assert not [name for name in names.split(", ") if not hasattr(found, name)], f"{page.name}: {module}"


def test_the_reference_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["settings"], standalone_mode=False)
    assert (ROOT / "docs/settings.md").read_text() == capsys.readouterr().out, (
        "write it again: slotlab settings > docs/settings.md"
    )
    cli.app(["settings", "--json"], standalone_mode=False)
    assert all(setting["meaning"] for setting in json.loads(capsys.readouterr().out)["settings"])


def test_the_reference_says_what_presets_change() -> None:
    by_key = {(setting.kind, setting.key): setting for setting in settings()}
    assert by_key["", "data.normalize"].presets["slow=128"] == ["default"]
    assert by_key["slot_attention", "model.slots"].values == "integer ≥ 2, ≤ 256"
    assert by_key["pixel", "model.slots"].presets == {"8": ["pixel-small"]}  # 11, as in pixel, is the default
    assert [setting.key for setting in settings(["optim.steps", "model.target_objectness"])] == [
        "model.target_objectness.threshold",
        "model.target_objectness.width",
        "optim.steps",
    ]
    with pytest.raises(UsageError, match="optim.step: no such setting"):
        settings(["optim.step"])
