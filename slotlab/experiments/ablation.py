"""Reads an ablation's plan from a TOML file: a base, a grid over any configuration keys, and single cells.

::

    preset = "log-2026-video"      # optional: config = "FILE.toml" over it, as in slotlab train
    cache = "cache/dinov2.zarr"
    seeds = 3                      # 0, 1, 2; or a list of them

    [set]                          # for all cells
    "optim.steps" = 300

    [grid]                         # the full product
    "model.decoder.mask_temperature" = [1.0, 0.5]
    "model.slots" = [5, 7, 11]

    [[cells]]                      # further cells; the name is optional
    name = "one linear layer"
    "model.projection" = "linear"

Keys are quoted dotted names or nested tables. ``preset`` and ``cache`` may vary as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from featcache.errors import FeatcacheError, UsageError
from featcache.store.reading import FeatureStore
from featcache.store.spec import flatten
from slotlab.config.load import load_config, read_toml
from slotlab.experiments.plan import Cell, Plan, cell_name, split_to_score

KEYS = ("preset", "config", "cache", "seeds", "split", "set", "grid", "cells")


def read_ablation(
    path: Path,
    *,
    cache: Path | None = None,
    seeds: int | None = None,
    split: str | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
) -> Plan:
    """The plan in a file; the other arguments, from the command line, override it.

    ``UsageError`` names an unknown key or wrong value, and its cell.
    """
    raw = read_toml(path)
    if unknown := sorted(set(raw) - set(KEYS)):
        raise UsageError(f"{path}: {unknown[0]}: no such key; there are: {', '.join(KEYS)}")
    base = _mapping(path, raw, "set")
    split = split or raw.get("split")
    if not isinstance(raw.get("config", ""), str):
        raise UsageError(f"{path}: config: must be the path of a TOML file, in quotes")
    file = path.parent / raw["config"] if "config" in raw else None

    def cell(name: str | None, settings: dict[str, Any]) -> Cell:
        name = cell_name([name]) if name else cell_name(_labels(settings))
        values = base | settings
        preset = values.pop("preset", raw.get("preset", "default"))
        values.pop("cache", None)
        store = settings.get("cache") or cache or base.get("cache") or raw.get("cache")
        where = f"{path}: cell {name}"
        if "seed" in values:
            raise UsageError(f"{where}: seed: is not a key to vary; write seeds = 3, or a list of them")
        if store is None:
            raise UsageError(f"{where}: no store; write cache = in the file, or pass --cache")
        try:
            # The command line overrides the base, but not the settings that make the cell.
            shorthands = {key: value for key, value in values.items() if key in settings or key not in _keys(overrides)}
            if steps is not None and "optim.steps" not in settings:
                shorthands["optim.steps"] = steps
            if split is not None:
                shorthands["data.eval_split"] = split
            kept = [text for text in overrides if _keys([text])[0] not in settings]
            config = load_config(preset, file, kept, **{k.replace(".", "__"): v for k, v in shorthands.items()})
            if Path(store).exists():  # what is missing is told with all that stores lack
                scored = split_to_score(config, FeatureStore.open(store).splits)
                config = config.model_copy(update={"data": config.data.model_copy(update={"eval_split": scored})})
        except FeatcacheError as error:
            raise type(error)(f"{where}: {error}") from error
        return Cell(name, settings, str(store), config)

    cells = [cell(None, settings) for settings in _grid(path, raw)]
    items = raw.get("cells", [])
    if not (isinstance(items, list) and all(isinstance(item, Mapping) for item in items)):
        raise UsageError(f"{path}: cells: must be a list of tables, each written as [[cells]]")
    for item in items:
        settings = flatten(item)
        name = settings.pop("name", None)
        cells.append(cell(None if name is None else str(name), settings))
    return Plan("ablate", cells[0].config.data.eval_split if cells else "", _seeds(path, raw, seeds), tuple(cells))


def seed_range(count: int) -> tuple[int, ...]:
    """The seeds 0 to N - 1 of ``--seeds N``. ``UsageError`` for N below 1."""
    if count < 1:
        raise UsageError(f"--seeds {count}: must be at least 1")
    return tuple(range(count))


def _seeds(path: Path, raw: Mapping[str, Any], given: int | None) -> tuple[int, ...]:
    value = raw.get("seeds", 3) if given is None else given
    if isinstance(value, list) and all(type(seed) is int for seed in value):
        return tuple(value)
    if type(value) is not int:
        raise UsageError(f"{path}: seeds: write a number, or a list of numbers")
    return seed_range(value)


def _mapping(path: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, Mapping):
        raise UsageError(f"{path}: {key}: must be a table, [{key}], of configuration keys")
    return flatten(value)


def _grid(path: Path, raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    axes = _mapping(path, raw, "grid")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{path}: grid: {key}: must be a list of values")
    if axes:
        yield from (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def _labels(settings: Mapping[str, Any]) -> list[str]:
    """Labels such as ``mask_temperature=0.5``: the last part of each key, or as many parts as make it unique."""
    labels = []
    for key, value in settings.items():
        parts = key.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other for other in settings if other != key]
        short = next(end for end in ends if end == key or not any(f".{other}".endswith(f".{end}") for other in others))
        shown = Path(value).stem if key == "cache" else str(value).lower() if isinstance(value, bool) else value
        labels.append(f"{short}={shown}")
    return labels


def _keys(overrides: Sequence[str]) -> list[str]:
    return [text.partition("=")[0].strip() for text in overrides]
