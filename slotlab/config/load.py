"""Loads a configuration from a preset, a TOML file and overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from featcache.errors import DataError, UsageError
from slotlab.config.model import MODEL_KINDS
from slotlab.config.schema import Config
from slotlab.config.section import Section


def presets() -> tuple[str, ...]:
    """Names of the shipped presets."""
    folder = resources.files("slotlab") / "presets"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def preset_values(name: str) -> dict[str, Any]:
    """The values that a shipped preset sets, as nested tables."""
    return tomllib.loads((resources.files("slotlab") / "presets" / f"{name}.toml").read_text(encoding="utf-8"))


def load_config(
    preset: str = "default",
    file: Path | None = None,
    overrides: Iterable[str] = (),
    *,
    found: Mapping[str, Any] | None = None,
    **shorthands: Any,
) -> Config:
    """A ``Config`` merged from preset, file and overrides (``section.key=value``, value as TOML or bare text).

    ``found`` are values by dotted keys that lie over the preset: those of a checkpoint. ``shorthands`` are overrides
    with ``__`` for the dot; ``None`` sets nothing. ``UsageError`` names a key that is unknown or invalid; ``DataError``
    for a file that cannot be read.
    """
    if preset not in presets():
        raise UsageError(f"--preset {preset}: unknown; there are: {', '.join(presets())}")
    layers = [(f"preset {preset}", preset_values(preset))]
    layers += [("checkpoint", _nested(key, value)) for key, value in (found or {}).items()]
    if file is not None:
        layers.append((str(file), read_toml(file)))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: write it as key=value, for example --set model.slots=7")
        layers.append(("--set", _nested(key.strip(), _value(value.strip()))))
    for key, value in shorthands.items():
        if value is not None:
            layers.append(("options", _nested(key.replace("__", "."), value)))
    merged: dict[str, Any] = {}
    places: dict[str, str] = {}  # key -> the layer that set it last
    for where, layer in layers:
        _merge(merged, layer)
        places |= dict.fromkeys((key for key, _ in dotted(layer)), where)
    return validate(merged, layers[-1][0], places)


def changed_by(config: Config, key: str, value: str) -> Config:
    """The configuration with one more ``--set key=value``. ``UsageError`` if the key or the result is invalid."""
    values = config.model_dump(exclude_none=True)
    _merge(values, _nested(key, _value(value)))
    return validate(values, "--set")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. ``DataError`` if it cannot be read, ``UsageError`` if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; name a TOML configuration") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a TOML configuration") from error
    except ValueError as error:  # not TOML, or not even text
        raise UsageError(f"{path}: not TOML ({error})") from error


def validate(values: Mapping[str, Any], where: str, places: Mapping[str, str] | None = None) -> Config:
    """The configuration of nested values. ``UsageError`` names a wrong key and its place (``places`` or ``where``)."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic puts the tag of the model's kind into the path; it is not part of the key.
        key = ".".join(str(part) for part in first["loc"] if part not in MODEL_KINDS)
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            model = values.get("model")
            message = _no_such(key, (model if isinstance(model, Mapping) else {}).get("kind", Config().model.kind))
        for given, place in (places or {}).items():
            if given == key or given.startswith(f"{key}."):
                where = place
        raise UsageError(": ".join(part for part in (where, key, message) if part)) from error


def _no_such(key: str, kind: str) -> str:
    """The message for an unknown key: what became of it in this version, or which key was probably meant."""
    section, _, name = key.rpartition(".")
    above = f"{section}." if section else ""
    below = [other for other in walk(kind) if other.path.startswith(above)]
    for other in below:
        if name in other.section.gone and other.path == above + other.name:
            return f"{other.section.gone[name].now}; leave it out"
    close = get_close_matches(
        name, {other.path.removeprefix(above).partition(".")[0] for other in below}, 1, cutoff=0.6
    )
    return "no such key" + (f"; did you mean {above}{close[0]}?" if close else "")


class Key(NamedTuple):
    """One key of a configuration, and its place in the schema."""

    path: str  # with its dots
    section: type[Section]
    name: str
    default: Any
    about: str  # description of the field that holds the section

    @property
    def field(self) -> FieldInfo:
        return self.section.model_fields[self.name]


def walk(
    kind: str, section: type[Section] = Config, above: str = "", defaults: Section | None = None, about: str = ""
) -> Iterator[Key]:
    """All keys of a configuration whose model has this ``kind``; the other arguments are for the recursion."""
    for name, item in section.model_fields.items():
        default = item.default if defaults is None else getattr(defaults, name)
        parts = [part for part in (item.annotation, *get_args(item.annotation)) if isinstance(part, type)]
        nested = [part for part in parts if issubclass(part, Section)]
        if name == "model":
            nested = [part for part in nested if part.model_fields["kind"].default == kind]
        for part in nested:
            given = default if isinstance(default, part) else None
            yield from walk(kind, part, f"{above}{name}.", given, item.description or "")
        if not nested:
            yield Key(above + name, section, name, default, about)


def dotted(nested: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested tables, with its dotted key."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{above}{key}.")
        else:
            yield above + key, value


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nested(rest, value) if dot else value}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
