"""The plan of an experiment: cells, each one configuration on one store, times seeds; and its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store.durable import LOCK, lock, make_directory, write_durably
from featcache.store.spec import flatten
from featcache.text import file_name
from slotlab.config.load import validate
from slotlab.config.schema import Config
from slotlab.runs.folder import read_result, result_path

Kind = Literal["compare", "ablate"]

SCHEMA = 1
PLAN, ERROR = "plan.json", "error.json"
_SHOWN_DIFFERENCES = 6


def split_to_score(config: Config, known: Sequence[str]) -> str:
    """The split of ``known`` that an experiment scores: the one that its configuration names, or, if it names none, the
    one that ``eval`` would take."""
    return config.data.eval_split if "eval_split" in config.data.model_fields_set else config.data.scored(known)


@dataclass(frozen=True)
class Cell:
    """One configuration on one store. Each run sets the seed."""

    name: str  # also part of its folders' names
    settings: Mapping[str, Any]  # settings that differ from other cells
    cache: str
    config: Config

    def to_json(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json", exclude={"seed"})
        return {"settings": dict(self.settings), "cache": self.cache, "config": config}


@dataclass(frozen=True)
class Run:
    """One cell with one seed, and its folder."""

    cell: Cell
    seed: int
    path: Path
    split: str  # split to score

    @property
    def config(self) -> Config:
        return self.cell.config.model_copy(update={"seed": self.seed})

    @property
    def evaluation(self) -> Path:
        """The file of the run's scores; it is written last and atomically."""
        return result_path(self.path, self.split, self.config.model.scored_by)

    def result(self) -> dict[str, Any] | None:
        """The run's scores as JSON, or None if there are none. ``DataError`` if they are damaged."""
        return read_result(self.path, self.split, self.config.model.scored_by)

    @property
    def finished(self) -> bool:
        """Whether the last step is scored and no later attempt failed; damaged scores count, and the table says so."""
        if (self.path / ERROR).exists():
            return False
        try:
            found = self.result()
        except DataError:
            return True
        return found is not None and bool(found.get("step") == self.config.optim.steps)

    @property
    def error(self) -> str | None:
        """The error of the last attempt in one line; None if it did not fail."""
        path = self.path / ERROR
        return str(json.loads(path.read_text())["error"]) if path.exists() else None

    def fail(self, error: str, traceback: str | None = None) -> None:
        make_directory(self.path)
        write_durably(self.path / ERROR, json.dumps({"error": error, "traceback": traceback}, indent=1).encode())


@dataclass(frozen=True)
class Plan:
    """Cells times seeds, all scored on one split."""

    kind: Kind
    split: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    stores: Mapping[str, Any] = field(default_factory=dict)  # how a comparison makes its stores; {} if stores are given

    def __post_init__(self) -> None:
        if not self.cells or not self.seeds:
            raise UsageError("nothing to run: a plan needs at least one cell and one seed")
        names = [cell.name.lower() for cell in self.cells]  # some file systems ignore case
        if twice := {cell.name for cell in self.cells if names.count(cell.name.lower()) > 1}:
            raise UsageError(f"two cells are called {min(twice)}; give each another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds {', '.join(map(str, self.seeds))}: one is named twice")
        for cell in self.cells:
            if cell.config.data.eval_split != self.split:
                raise UsageError(
                    f"cell {cell.name} is evaluated on {cell.config.data.eval_split}, the first on {self.split}; "
                    "a table needs one split for all: leave data.eval_split alone, or use --split"
                )

    def runs(self, out: Path) -> list[Run]:
        """All runs: the first seed of every cell before any second, so that an interrupted plan covers all cells."""
        return [
            Run(cell, seed, out / "runs" / f"{cell.name}-seed{seed}", self.split)
            for seed in self.seeds
            for cell in self.cells
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "split": self.split,
            "seeds": list(self.seeds),
            "stores": dict(self.stores),
            "cells": {cell.name: cell.to_json() for cell in self.cells},
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Plan:
        cells = [
            Cell(name, cell["settings"], cell["cache"], validate(cell["config"], f"{where}: cell {name}"))
            for name, cell in raw["cells"].items()
        ]
        return cls(raw["kind"], raw["split"], tuple(raw["seeds"]), tuple(cells), raw["stores"])


def read_plan(out: Path) -> Plan:
    """The plan in an experiment's folder. ``DataError`` if it is missing or damaged."""
    path = out / PLAN
    if not path.exists():
        raise DataError(f"{out}: no {PLAN}; name a folder made by slotlab compare or slotlab ablate")
    try:
        raw = json.loads(path.read_text())
        if raw.get("schema") == SCHEMA:
            return Plan.from_json(raw, str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); restore it, or choose another --out") from error
    raise IncompatibleError(f"{path}: schema {raw.get('schema')}, this version reads {SCHEMA}; choose another --out")


@contextmanager
def opened(plan: Plan, out: Path) -> Iterator[None]:
    """Lock ``out`` for this process, and write the plan there.

    Errors are those of :func:`require_free`, and ``DataError`` if another process holds the folder.
    """
    require_free(plan, out)
    make_directory(out)
    with lock(out):
        write_durably(out / PLAN, json.dumps(plan.to_json(), indent=1).encode())
        yield


def require_free(plan: Plan, out: Path) -> None:
    """Raise ``IncompatibleError``, naming differences, if ``out`` has another plan, ``DataError`` if other files.

    A plan may extend an earlier one by seeds and cells, but may not change it otherwise.
    """
    if (out / PLAN).exists():
        if differences := differing(read_plan(out), plan):
            shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
            more = f"; {len(differences) - _SHOWN_DIFFERENCES} more" if len(differences) > _SHOWN_DIFFERENCES else ""
            raise IncompatibleError(f"{out}: was made by another plan ({shown}{more}); choose another --out")
    elif out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise DataError(f"{out}: holds other things and no {PLAN}; choose another --out")


def differing(then: Plan, now: Plan) -> list[str]:
    """The parts of an earlier plan that this one lacks or changes, a line each."""
    found = [
        f"{name}: {before} then, {after} now"
        for name, before, after in (("kind", then.kind, now.kind), ("split", then.split, now.split))
        if before != after
    ]
    made, makes = flatten(then.stores), flatten(now.stores)
    found += [f"{key}: {made[key]} then, {makes.get(key)} now" for key in made if made[key] != makes.get(key)]
    if lost := set(then.seeds) - set(now.seeds):
        found.append(f"seeds {', '.join(map(str, sorted(lost)))} then, not now")
    cells = {cell.name: cell for cell in now.cells}
    for cell in then.cells:
        if cell.name not in cells:
            found.append(f"cell {cell.name} then, not now")
            continue
        before, after = (flatten(c.to_json()) for c in (cell, cells[cell.name]))
        found += [
            f"{cell.name} {key.removeprefix('config.')}: {before.get(key)} then, {after.get(key)} now"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        ]
    return found


def cell_name(parts: Iterable[str]) -> str:
    """A name that any file system accepts, the same for the same parts."""
    return file_name(",".join(parts)).strip("._") or "base"
