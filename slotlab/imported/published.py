"""A published checkpoint: its tensors, read without running code that it may contain."""

from __future__ import annotations

import hashlib
import pickle
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from featcache.errors import DataError, IncompatibleError
from featcache.text import in_utf8

NESTINGS = ("state_dict", "model")  # Lightning's; SPOT's


@dataclass(frozen=True)
class Published:
    """The tensors of a checkpoint by the names of its source, in float32, and where they are from."""

    path: Path
    sha256: str  # of the file
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]  # of the tensors, as they are in the file
    step: int | None  # of its training; None: not told

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. ``IncompatibleError`` if there is none of that name."""
        if name not in self.tensors:
            raise IncompatibleError(f"{self.path}: has no {name}; is it a checkpoint of another source (--from)?")
        return tuple(self.tensors[name].shape)

    def has(self, start: str) -> bool:
        """Whether a tensor's name begins like that."""
        return any(name.startswith(start) for name in self.tensors)

    def blocks(self, start: str) -> int:
        """Number of blocks ``START0.``, ``START1.`` and so on."""
        found = {name.removeprefix(start).partition(".")[0] for name in self.tensors if name.startswith(start)}
        return len(found)


def read_published(path: Path, spelling: Callable[[str], str]) -> Published:
    """Read a checkpoint; ``spelling`` gives each tensor the name that the source's table knows.

    ``DataError`` for a file that is missing or damaged, holds code, or no tensors by name.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; name a checkpoint")
    loaded = _load(path)
    step = loaded.get("global_step") if isinstance(loaded, Mapping) else None
    for key in NESTINGS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    named = loaded.items() if isinstance(loaded, Mapping) else ()
    found = {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
    tensors = {spelling(name): value.float() if value.is_floating_point() else value for name, value in found.items()}
    if not tensors:
        raise DataError(f"{path}: holds no tensors by name; name a checkpoint with its state dict")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Published(
        path,
        digest,
        tensors,
        {spelling(name): name for name in found},
        step if isinstance(step, int) and step > 0 else None,
    )


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            with in_utf8(path) as name:
                return load_file(name)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: {_with_code(path)}") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        brief = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a checkpoint of tensors, or damaged ({brief}); download it again") from error


def _with_code(path: Path) -> str:
    """Why tensors alone could not be read of a pickle, and what to do."""
    try:
        objects = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a file that is no archive, or is cut short
        return "not a checkpoint of tensors, or damaged; download it again"
    save = (
        f"import torch; c = torch.load({str(path)!r}, 'cpu', weights_only=False); "
        f"torch.save({{'state_dict': c['state_dict']}}, {str(path.with_suffix('.tensors.ckpt'))!r})"
    )
    return (
        f"holds code beside its tensors ({', '.join(sorted(objects)[:3]) or 'not named'}), which is not run; if you "
        f"trust the file, save its tensors alone where its source is installed: python -c {shlex.quote(save)}"
    )
