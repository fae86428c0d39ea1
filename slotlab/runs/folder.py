"""The files of a run folder, and checks that a run and a store belong together."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import DataError, IncompatibleError, UsageError, compare_settings
from featcache.store.durable import make_directory, write_durably
from featcache.store.reading import FeatureStore
from featcache.store.spec import READABLE, StoreSpec, flatten
from featcache.stream.stream import VIDEO
from slotlab.config.model import ForecastConfig
from slotlab.config.schema import Config
from slotlab.runs import checkpoint
from slotlab.runs.imported import wanted_store

STORE, LOG, SUMMARY = "store.json", "metrics.jsonl", "summary.json"
TRACKS = "tracks.zarr"


def trained_spec(run: Path) -> StoreSpec:
    """The specification of the store that a run was trained on, from the run folder."""
    path, raw = run / STORE, trained_on(run)["spec"]
    if raw.get("schema") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise IncompatibleError(f"{path}: store schema {raw.get('schema')}, this version reads {known}; train again")
    return StoreSpec.from_json(raw)


def check_run(config: Config, store: FeatureStore, run: Path, resume: bool) -> None:
    """Raise ``UsageError`` if a run exists already, or none to resume; ``IncompatibleError`` if it is another run."""
    exists = (run / checkpoint.CONFIG).exists()
    if exists and resume and trained_on(run)["imported"]:
        raise UsageError(
            f"{run}: was imported, with weights and no state of an optimiser, so nothing can be resumed; train on from "
            f"its weights: leave out --resume, add --config {run / checkpoint.CONFIG} --init-from {run}, and choose "
            "another --out"
        )
    anew = "" if checkpoint.exists(run) else "; it has no checkpoint yet: delete it to start anew"
    if (run / "zarr.json").exists():
        raise UsageError(f"{run}: is a store; choose another --out")
    if not resume:
        if exists:
            raise UsageError(f"{run}: exists already; add --resume to continue it, or choose another --out{anew}")
        return
    if not exists:
        raise UsageError(f"{run}: nothing to resume; leave out --resume")
    before, now = (flatten(c.model_dump()) for c in (checkpoint.load_run_config(run), config))
    changed = [
        f"{key}: {before.get(key)} then, {now.get(key)} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise IncompatibleError(f"{run}: was made with another configuration ({'; '.join(changed)}){anew}")
    check_store(run, store)
    samples = _samples(config, store)
    if differences := compare_settings(samples, trained_on(run)["samples"] or samples):  # early runs lack them
        raise IncompatibleError(
            f"{store.path}: not the videos that {run} was begun on", differences, "name its own store with --cache"
        )


def _samples(config: Config, store: FeatureStore) -> dict[str, Any]:
    """The settings and videos that decide which samples a run is trained on."""
    split, tap = store[config.data.train_split], config.data.tap
    return {
        "split": split.name,
        "source_fingerprint": split.spec.source_fingerprint,
        "videos": len(split.spec.lengths),
        "frames": sum(split.spec.lengths),
        **({"dtype": store.spec.dtype, "precision": store.spec.precision} if tap != VIDEO else {}),
    }


def create_run(config: Config, store: FeatureStore, run: Path, init_from: Path | None) -> None:
    """Make a run's folder: record its configuration, its store, and the run whose parameters it starts with."""
    path = store.path.resolve()
    places = {"path": str(path), "from_run": os.path.relpath(path, run.resolve())}  # the run may move, or both
    note = {**places, "identity": store.spec.identity(), "spec": store.spec.to_json()}
    note["samples"] = _samples(config, store)
    if init_from is not None:
        note["init_from"] = str(init_from.resolve())
    make_directory(run)
    write_durably(run / STORE, json.dumps(note, indent=1).encode())
    write_durably(run / checkpoint.CONFIG, config.to_toml().encode())  # last: it says that the run exists


def create_imported(
    config: Config,
    wanted: StoreSpec,
    store: FeatureStore | None,
    run: Path,
    model: nn.Module,
    imported: Mapping[str, Any],
) -> None:
    """Make the folder of a run that was trained elsewhere, on features of a store like ``wanted``.

    ``imported`` says where it is from, and ``store`` is one to use it on: ``IncompatibleError`` if that does not fit.
    """
    path = "" if store is None else str(store.path.resolve())
    raw: dict[str, Any] = {"path": path, "from_run": os.path.relpath(path, run.resolve()) if path else None}
    raw |= {"identity": wanted.identity(), "spec": wanted.to_json(), "imported": dict(imported)}
    note = json.dumps(raw, indent=1)
    if store is not None:
        _check_features(run, config, _complete(json.loads(note)), store)
    make_directory(run)
    checkpoint.save(run, model, None, None, {"step": config.optim.steps, "schedule": {}, "stream": {}})
    write_durably(run / STORE, note.encode())
    write_durably(run / checkpoint.CONFIG, config.to_toml().encode())  # last: it says that the run exists


def trained_on(run: Path) -> dict[str, Any]:
    """The contents of a run's ``store.json``. ``DataError`` if it is missing or damaged."""
    path = run / STORE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        kinds = {"path": str, "identity": dict, "spec": dict}
        if wrong := [key for key, kind in kinds.items() if not isinstance(found[key], kind)]:
            raise TypeError(", ".join(wrong))
        return _complete(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: missing, damaged or of an earlier version; train the run again") from error


def _complete(note: dict[str, Any]) -> dict[str, Any]:
    """The contents of a ``store.json`` with all that one may say."""
    return {"from_run": None, "init_from": None, "samples": None, "imported": None} | note


def begun_from(run: Path, init_from: Path | None) -> Path | None:
    """The run whose parameters a run began with, or None. ``UsageError`` if ``init_from`` names another one."""
    noted = trained_on(run)["init_from"]
    if init_from is not None and str(init_from.resolve()) != noted:
        raise UsageError(f"--init-from {init_from}: {run} was begun with {noted or 'fresh parameters'}; leave it out")
    return None if noted is None else Path(noted)


def store_path(run: Path, option: str = "--cache") -> Path:
    """The path of the store that a run was trained on, relative to here if below.

    ``DataError`` if it is gone, with the ``option`` that names another.
    """
    noted = trained_on(run)
    if noted["imported"] and not noted["path"]:
        command, out = wanted_store(run, trained_spec(run))
        raise DataError(
            f"{run}: was imported without a store; make one with: {command}; then add {option} {shlex.quote(str(out))}"
        )
    places = [Path(noted["path"])]
    if noted["from_run"]:
        places.append(Path(os.path.normpath(run.resolve() / noted["from_run"])))
    for path in places:
        if path.exists():
            return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    raise DataError(f"{run}: was trained on {places[0]}, which is not there; say where its store is with {option}")


def check_store(run: Path, store: FeatureStore, any_grid: bool = False) -> None:
    """Raise ``IncompatibleError`` unless the store holds the kind of features that the run was trained on.

    Another grid of patches fits a model that learns nothing of it, or all with ``any_grid``. A run on the stored frames
    fits any store: it reads no features.
    """
    config = checkpoint.load_run_config(run)
    if config.data.tap != VIDEO:
        _check_features(run, config, trained_on(run), store, any_grid)


def _check_features(
    run: Path, config: Config, noted: Mapping[str, Any], store: FeatureStore, any_grid: bool = False
) -> None:
    names = config.data.taps or (store.tap(None),)
    for tap in names:
        if tap not in store.spec.taps:
            raise IncompatibleError(
                f"{store.path}: no tap {tap!r}; it has: {', '.join(store.spec.taps)}; of {run}, "
                f"{_remedy(run, noted, store)}"
            )
    # How features are stored and which part of a frame they are of, not what they mean.
    ignored: tuple[str, ...] = (
        "dtype",
        "precision",
        "taps.",
        "schema",
        "preprocessing.fit",
        "preprocessing.margin",
    )
    if not isinstance(config.model, ForecastConfig):  # a predictor has learnt how far things go from frame to frame
        ignored += ("frame_stride",)
    if any_grid or config.any_grid:
        ignored += ("preprocessing.size", "model.grid", *(f"{name} grid" for name in names))

    def deciding(identity: Mapping[str, Any], taps: Mapping[str, Any]) -> dict[str, Any]:
        known = dict(identity)
        for name in names:
            known |= {f"{name} {key}": value for key, value in taps.get(name, {}).items()}
        return {key: value for key, value in known.items() if not key.startswith(ignored)}

    spec = json.loads(json.dumps(store.spec.to_json()))
    now = deciding(json.loads(json.dumps(store.spec.identity())), spec["taps"])
    then = deciding(noted["identity"], noted["spec"]["taps"])
    if noted["imported"]:  # a checkpoint says which weights the backbone had, not in which file, unless in itself
        if "model.weights_sha256" not in then:
            now.pop("model.weights_sha256", None)
        if str(now.get("model.weights_tag")).startswith("file:"):
            now["model.weights_tag"] = then["model.weights_tag"]
    if differences := compare_settings(now, then):
        raise IncompatibleError(
            f"{store.path}: not the features that {run} was trained on",
            differences,
            _remedy(run, noted, store),
        )


def _remedy(run: Path, noted: Mapping[str, Any], store: FeatureStore) -> str:
    """What to do where a run was given a store that does not fit."""
    if not noted["imported"]:
        return "name its own store, or one made the same way, with --cache"
    command, out = wanted_store(run, StoreSpec.from_json(noted["spec"]), store)
    return f"make what it wants with: {command}; then add --cache {shlex.quote(str(out))}"


def tracks_path(run: Path) -> Path:
    """Where the slots that a run follows are stored, unless another place is named."""
    return run / TRACKS


def result_path(run: Path, split: str, name: str = "eval") -> Path:
    """The file of a run's result on a split; ``name`` is ``eval``, ``robustness`` or ``rollout``."""
    return run / f"{name}-{split}.json"


def write_result(run: Path, result: Mapping[str, Any], name: str = "eval") -> None:
    """Write a result, which names its ``split``, completely or not at all. ``DataError`` if it cannot be written."""
    write_durably(result_path(run, result["split"], name), json.dumps(result, indent=1).encode())


def read_result(run: Path, split: str, name: str = "eval") -> dict[str, Any] | None:
    """A run's result on a split, or None if there is none. ``DataError`` if it is damaged."""
    path = result_path(run, split, name)
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise TypeError("not an object")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); delete it and run the same command again") from error


def keep_result(run: Path, store: FeatureStore, result: Mapping[str, Any], name: str = "eval") -> list[str]:
    """Write a result where reports and tables look for it; return a warning if the folder cannot be written.

    A result on another store than the run's own is not written while the run's own store exists.
    """
    try:
        own = store_path(run).resolve() == store.path.resolve()
    except DataError:
        own = True  # this store replaces the one that is gone
    try:
        if own:
            write_result(run, result, name)
        return []
    except DataError as error:  # the result itself is sound
        reason = getattr(error.__cause__, "strerror", error)
        return [f"{result_path(run, result['split'], name)}: cannot be written ({reason}), so the result is not kept"]


def keep_rows(path: Path, step: int) -> float:
    """Drop the rows logged after ``step``, from which a run resumes; return the seconds it had trained until then."""
    kept = [row for row in read_rows(path) if row["step"] <= step]
    if path.exists():
        write_durably(path, "".join(f"{json.dumps(row)}\n" for row in kept).encode())
    return float(kept[-1]["seconds"]) if kept else 0.0


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, without a last line that a crash cut short. ``DataError`` for a damaged line."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])  # every row has one
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise DataError(f"{path}: line {number}: damaged ({error}); delete the line") from error
    return rows


def write_summary(run: Path, device: torch.device, processes: int) -> None:
    """Write ``summary.json``: the outcome of the run, and the machine and versions that made it."""
    rows = read_rows(run / LOG)
    summary = {
        "finished": True,
        **(rows[-1] if rows else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "slotlab": version("slotlab")},
    }
    write_durably(run / SUMMARY, json.dumps(summary, indent=1).encode())
