"""The reference of all settings, made from the schema; ``slotlab settings`` prints it, docs/settings.md holds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from inspect import cleandoc
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from featcache.errors import UsageError
from slotlab.config.load import Key, dotted, preset_values, presets, walk
from slotlab.config.model import MODEL_KINDS
from slotlab.config.schema import Config
from slotlab.config.section import Section

HEAD = """# Settings

All keys of a run's configuration. Set them with `--set KEY=VALUE` on the command line, or in the tables of a TOML file
(`--config`), where words take quotes; leave out keys that are unset. *Presets* lists the presets that set another value
than the default. [models.md](models.md) explains the parts.

This page is the output of `slotlab settings`.
"""
NUMBERS = {int: "integer", float: "number"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One setting. Values and default are written as for ``--set``."""

    key: str
    kind: str  # kind of the model that has it; empty for all
    about: str  # description of its section
    values: str
    default: str
    meaning: str
    presets: dict[str, list[str]] = field(default_factory=dict)  # value -> the presets that set it; never the default

    @property
    def section(self) -> str:
        """The key without its last part."""
        return self.key.rpartition(".")[0]

    def as_dict(self) -> dict[str, Any]:
        """One entry of ``slotlab settings --json``; ``kind`` is null for a key of all models."""
        names = ("key", "values", "default", "meaning", "presets")
        return {name: getattr(self, name) for name in names} | {"kind": self.kind or None}


def settings(below: Iterable[str] = ()) -> list[Setting]:
    """Every setting of every kind of model, or those whose key is, or begins with, one of ``below``.

    ``UsageError`` if no setting begins with one of them.
    """
    found: dict[tuple[str, str], Setting] = {}
    for kind in MODEL_KINDS:
        chosen = {name: dict(dotted(preset_values(name))) for name in _presets_of(kind)}
        for key in walk(kind):
            if _only_value(key.field):
                continue
            of = kind if key.path.startswith("model.") else ""
            about = ". ".join(filter(None, (key.about, cleandoc(key.section.__doc__ or "").partition("\n\n")[0])))
            setting = found.setdefault(
                (of, key.path),
                Setting(key.path, of, _plain(about), _values(key.field), _text(key.default), _meaning(key)),
            )
            for name, values in chosen.items():
                if key.path in values and values[key.path] != key.default:
                    setting.presets.setdefault(_text(values[key.path]), []).append(name)
    wanted = tuple(below)
    for given in wanted:
        if not any(_begins(setting.key, given) for setting in found.values()):
            raise UsageError(f"{given}: no such setting; slotlab settings lists all of them")
    # Keys outside of any section first, then section by section.
    order = ("", *Config.model_fields)
    rows = sorted(found.values(), key=lambda s: order.index(s.section.partition(".")[0]))
    return [s for s in rows if not wanted or any(_begins(s.key, given) for given in wanted)]


def markdown(chosen: Iterable[Setting]) -> str:
    """The reference as Markdown: a table for each section of the configuration."""
    sections: dict[tuple[str, str], list[Setting]] = {}
    for setting in chosen:
        sections.setdefault((setting.kind, setting.section), []).append(setting)
    return "\n".join(line for (kind, name), rows in sections.items() for line in _table(kind, name, rows))


def _table(kind: str, name: str, rows: list[Setting]) -> list[str]:
    title = f"`{name}`" if name else "The run"
    if kind:
        title += f' with `model.kind = "{kind}"`'
    lines = ["", f"{'###' if '.' in name else '##'} {title}", "", rows[0].about]
    if name == "model":
        lines += ["", f"Presets: {', '.join(_code(preset) for preset in _presets_of(kind))}."]
    lines += ["", "| key | values | default | meaning | presets |", "|---|---|---|---|---|"]
    for row in rows:
        by = "; ".join(f"{_code(value)} {', '.join(sorted(names))}" for value, names in row.presets.items())
        cells = (_code(row.key.rpartition(".")[2]), row.values, _code(row.default), row.meaning, by)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _presets_of(kind: str) -> list[str]:
    return [name for name in presets() if preset_values(name)["model"]["kind"] == kind]


def _begins(key: str, given: str) -> bool:
    return key == given or key.startswith(f"{given}.")


def _meaning(key: Key) -> str:
    """The description of a key's field (or of the field that it overrides), and the settings it depends on."""
    bases = [base for base in key.section.__mro__ if issubclass(base, Section)]
    described = (base.model_fields[key.name].description for base in bases if key.name in base.model_fields)
    text = next((text for text in described if text), "")
    if key.name in key.section.read_by:
        deciding, values = key.section.read_by[key.name]
        forms = (value if "=" in value else value.lower() for value in values)  # TOML's true and false
        text += f". Only with {_code(deciding)} = {', '.join(map(_code, forms))}"
    return text


def _values(of: FieldInfo) -> str:
    """The values that a field accepts: words, or a kind of number and its bounds."""
    kinds = [kind for kind in (get_args(of.annotation) or (of.annotation,)) if kind is not NoneType]
    if get_origin(of.annotation) is Literal or of.examples:
        return ", ".join(_code(value) for value in of.examples or kinds)
    if kinds == [bool]:
        return "`true`, `false`"
    bounds = [f"{sign} {getattr(m, name):g}" for m in of.metadata for name, sign in BOUNDS.items() if hasattr(m, name)]
    return " ".join([NUMBERS.get(kinds[0], "text"), ", ".join(bounds)]).strip()


def _only_value(of: FieldInfo) -> str:
    """The only word that a field accepts; empty if there is a choice."""
    words = get_args(of.annotation) if get_origin(of.annotation) is Literal else ()
    return words[0] if len(words) == 1 else ""


def _plain(docstring: str) -> str:
    return docstring.replace("\n", " ").replace("``", "`")


def _text(value: Any) -> str:
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _code(text: Any) -> str:
    return str(text) if text == "unset" else f"`{text}`"
