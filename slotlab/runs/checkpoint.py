"""Checkpoints and configuration of a run, in files that need no tool to read and never hold a pickle.

::

    runs/NAME/
      config.toml           the configuration, complete
      store.json            the store of the training: path and identity
      metrics.jsonl         one row for each logged step
      checkpoint/           model.safetensors, optimizer.safetensors, state.json; average.safetensors with optim.ema
      summary.json          outcome and machine; written at the end

A checkpoint is written to a folder beside the old one, synced, and swapped in by renaming, so that a whole one always
exists.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from featcache.errors import DataError, IncompatibleError, UsageError
from featcache.store.durable import make_directory, write_durably
from featcache.text import in_utf8
from slotlab.config.load import read_toml, validate
from slotlab.config.schema import Config, DataConfig
from slotlab.models.base import Model

CONFIG = "config.toml"
FOLDER, STATE = "checkpoint", "state.json"
MODEL, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.safetensors"


def save(
    run: Path,
    model: nn.Module,
    average: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    state: dict[str, Any],
) -> None:
    """Write the checkpoint of a run in place of the last one, without an ``optimizer`` if it cannot be resumed.

    ``DataError`` where it cannot be written: the last one stays.
    """
    fresh, old, final = (run / f"{FOLDER}{suffix}" for suffix in (".new", ".old", ""))
    shutil.rmtree(fresh, ignore_errors=True)
    files = {name: module.state_dict() for name, module in ((MODEL, model), (AVERAGE, average)) if module is not None}
    if optimizer is not None:
        files[OPTIMIZER] = {
            f"{index}.{name}": value
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
    try:
        make_directory(fresh)
        for name, tensors in files.items():
            write_durably(fresh / name, to_bytes({k: v.contiguous() for k, v in tensors.items()}))
        write_durably(fresh / STATE, json.dumps(state, indent=1).encode())
    except DataError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def exists(run: Path) -> bool:
    """Whether a run has a whole checkpoint."""
    return _whole(run) is not None


def folder(run: Path) -> Path:
    """The folder of a run's last whole checkpoint. ``DataError`` if there is none."""
    whole = _whole(run)
    if whole is not None:
        return whole
    raise DataError(f"{run}: no checkpoint; name a folder that slotlab train made (for example runs/demo)")


def _whole(run: Path) -> Path | None:
    for suffix in ("", ".old"):  # a crash between the two renames leaves only the old one
        if (run / f"{FOLDER}{suffix}" / STATE).exists():
            return run / f"{FOLDER}{suffix}"
    return None


def state(run: Path) -> dict[str, Any]:
    """The ``step``, ``schedule`` and ``stream`` of a run's last checkpoint. ``DataError`` if it is damaged."""
    path = folder(run) / STATE
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {key: found[key] for key in ("step", "schedule", "stream")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); train again") from error


def load_model(run: Path, model: Model, name: str | None = None) -> list[str]:
    """Fill ``model`` with the run's weights: those in file ``name``, or averaged ones if the run has them.

    Returns a sentence for each difference from the version that made the run. ``DataError`` without a whole
    checkpoint, ``IncompatibleError`` for weights of another model.
    """
    path = folder(run) / (name or _to_use(run))
    tensors = _tensors(path)
    differs = [*model.of_earlier_version(tensors), *_gone(run)]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise IncompatibleError(f"{path}: weights of another model; {str(error).splitlines()[-1].strip()}") from error
    return differs


def directions(run: Path, data: DataConfig) -> dict[str, Tensor] | None:
    """The normaliser's tensors of a run that another begins from, if its parameters are in directions of its data set;
    None if they are not.

    ``IncompatibleError`` where the other's ``data`` wants other directions.
    """
    theirs = load_run_config(run).data
    if not (theirs.directions or data.directions):
        return None
    for key in ("normalize", "center"):
        if (has := getattr(theirs, key)) != (wants := getattr(data, key)):
            raise IncompatibleError(f"--init-from {run}: has data.{key}={has}, not {wants}; add --set data.{key}={has}")
    start = "normaliser."
    tensors = _tensors(folder(run) / _to_use(run))
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def load_parameters(run: Path, model: nn.Module) -> None:
    """Copy another run's parameters into ``model``; what is measured on the store (normalisation, thresholds) stays.

    ``IncompatibleError`` if that run has another model.
    """
    path = folder(run) / _to_use(run)
    theirs, ours = _tensors(path), dict(model.named_parameters())
    differing = [name for name, value in ours.items() if name not in theirs or theirs[name].shape != value.shape]
    if differing:
        raise IncompatibleError(f"--init-from {run}: another model ({', '.join(differing[:3])} do not fit)")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(theirs[name])


def _to_use(run: Path) -> str:
    return AVERAGE if load_run_config(run).optim.ema else MODEL


def load_optimizer(run: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimiser's state from a run's last checkpoint. ``DataError`` if it is damaged."""
    raw = optimizer.state_dict()
    raw["state"] = {}
    for key, value in _tensors(folder(run) / OPTIMIZER).items():
        index, _, name = key.partition(".")
        raw["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(raw)


def load_run_config(run: Path) -> Config:
    """The configuration of a run. ``DataError`` for a folder that is not a run, or is damaged."""
    path = run / CONFIG
    if not path.is_file():
        raise DataError(f"{run}: not a run; name a folder that slotlab train made (for example runs/demo)")
    try:
        return validate(read_toml(path), str(path))
    except UsageError as error:
        raise DataError(f"{error}; restore the file, or train again") from error


def _gone(run: Path) -> list[str]:
    """What settings that are gone mean for the results of a run that has them."""
    gone = load_run_config(run).model.gone
    return [gone[key].differs for key in read_toml(run / CONFIG)["model"] if key in gone and gone[key].differs]


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with in_utf8(path) as name:
            return load_file(name)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); train again, or restore the file") from error
