"""COCO's run-length encoding of binary masks, in its compressed form, as pycocotools reads and writes it.

The format reads a mask column by column, and writes the lengths of its runs, zeros first, as differences to the run
two before, in groups of five bits, each a printable character.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError


def encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as ``{"size": [H, W], "counts": text}``."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0] if flat.size and flat[0] else [], [0], changes, [flat.size]]).astype(np.int64)
    return {"size": list(mask.shape), "counts": _pack(np.diff(edges).tolist())}


def decode(rle: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """The mask (H, W) bool of :func:`encode`. ``DataError`` if the runs do not fill it."""
    height, width = rle["size"]
    runs = _unpack(rle["counts"])
    if sum(runs) != height * width or min(runs, default=0) < 0:
        raise DataError(f"run lengths of {sum(runs)} pixels in a mask of {height}x{width}; write the file again")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape((height, width), order="F")


def _pack(runs: list[int]) -> str:
    characters = []
    for index, run in enumerate(runs):
        value = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            characters.append(chr(48 + bits + 32 * more))
    return "".join(characters)


def _unpack(text: str) -> list[int]:
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift  # the sign
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    return runs
