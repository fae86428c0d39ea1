"""The stored forms of a patch token, each under the word that ``--dtype`` and a store's metadata use.

This module alone knows how a token is stored. Layouts, writers, readers, the stream, copies and statistics ask the form
for its arrays and let it encode and decode. A new form is one class here, and its word in `featcache.words`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from featcache.memory import kernels
from featcache.words import Dtype

FEATURES = "features"  # folder of the tokens' values: every form has it, and it is most of what a stream reads

CACHED_TOKENS = 1024  # tokens decoded at a time; 1.5 MB of 384 float32 features stay in the cache

NAN = float("nan")  # fill value of missing chunks: it cannot be mistaken for a feature

Stored = Mapping[str, Tensor]  # the arrays of some frames' tokens by folder: (..., N, D), or (..., N) for scales


@dataclass(frozen=True)
class StoredArray:
    """One of the arrays that a form keeps for each tap, with one row per frame."""

    folder: str
    dtype: str
    dimensions: tuple[str, ...]  # of a row: patch, feature, or both
    fill: float | int

    def path(self, tap: str) -> str:
        """Path of the array below its split."""
        return f"{self.folder}/{tap}"

    def shape(self, patches: int, dim: int) -> tuple[int, ...]:
        """Shape of a row: a frame of N patches with D features."""
        sizes = {"patch": patches, "feature": dim}
        return tuple(sizes[name] for name in self.dimensions)


class Decoder(ABC):
    """Makes tokens of the arrays that are stored of them."""

    decoded: torch.dtype  # type of the tokens that a reader gets

    @abstractmethod
    def decode_into(self, stored: Stored, out: Tensor) -> Tensor:
        """Decode into ``out`` (..., N, D), of the type ``decoded``, and return it."""

    @abstractmethod
    def decode(self, stored: Stored) -> Tensor:
        """Tokens (..., N, D), of the type ``decoded``."""


class Encoding(Decoder):
    """One stored form of patch tokens."""

    name: ClassVar[Dtype]
    arrays: ClassVar[tuple[StoredArray, ...]]  # `FEATURES` first
    error: ClassVar[float]  # median of ‖token - decoded‖ / ‖token‖ over tokens of DINOv2 ViT-S/14, block 12
    plain: ClassVar[bool] = False  # the stored array is what a reader gets

    @abstractmethod
    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        """The stored arrays of tokens (..., N, D) of any float type, on the tokens' device."""

    def decode(self, stored: Stored) -> Tensor:
        """Tokens (..., N, D), of the type ``decoded``, from the arrays of :meth:`encode`."""
        features = stored[FEATURES]
        return self.decode_into(stored, torch.empty(features.shape, dtype=self.decoded, device=features.device))

    def rounded(self, tokens: Tensor) -> Tensor:
        """Tokens (..., N, D) as a reader of the store will see them."""
        return self.decode(self.encode(tokens))

    def token_bytes(self, dim: int) -> int:
        """Bytes of a stored token of D features."""
        return sum(int(np.prod(a.shape(1, dim))) * np.dtype(a.dtype).itemsize for a in self.arrays)


class Float16(Encoding):
    """Half precision: a batch holds exactly what the file holds."""

    name = "float16"
    arrays = (StoredArray(FEATURES, "float16", ("patch", "feature"), NAN),)
    decoded = torch.float16
    error = 2e-4
    plain = True

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        return {FEATURES: tokens.half()}

    def decode_into(self, stored: Stored, out: Tensor) -> Tensor:
        return out.copy_(stored[FEATURES])

    def decode(self, stored: Stored) -> Tensor:
        return stored[FEATURES]


class Int8(Encoding):
    """int8 codes with one float16 scale a token, at half the bytes of float16.

    Symmetric absmax quantisation: ``token ≈ scale * code`` with codes in [-127, 127].
    """

    name = "int8"
    arrays = (
        StoredArray(FEATURES, "int8", ("patch", "feature"), 0),
        StoredArray("scales", "float16", ("patch",), NAN),
    )
    decoded = torch.float32
    error = 7e-3

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        tokens = tokens.float()
        # The scale is rounded to float16 first, and never down to zero, so that the codes fit the stored scale.
        scale = (tokens.abs().amax(-1) / 127).clamp_min(2.0**-24).half()
        codes = (tokens / scale.float().unsqueeze(-1)).round_().clamp_(-127, 127)
        return {FEATURES: codes.to(torch.int8), "scales": scale}

    def decode_into(self, stored: Stored, out: Tensor) -> Tensor:
        codes, scale = stored[FEATURES], stored["scales"]
        past_caches = out.device.type == "cpu" and out.nbytes >= kernels.PAST_CACHES and _whole_lines(codes, out)
        if past_caches and (dequantise := kernels.dequantise()) is not None:
            scales = scale.float().contiguous()
            dequantise(out.data_ptr(), codes.data_ptr(), scales.data_ptr(), scales.numel(), out.shape[-1])
            return out
        # On a CPU a block is scaled while the cache still holds it: twice the rate of two passes over everything.
        step = CACHED_TOKENS // max(1, scale[:1].numel()) if out.device.type == "cpu" else len(out)
        for start in range(0, len(out), max(1, step)):
            block = slice(start, start + max(1, step))
            out[block].copy_(codes[block]).mul_(scale[block].float().unsqueeze(-1))
        return out


def _whole_lines(codes: Tensor, out: Tensor) -> bool:
    contiguous = codes.is_contiguous() and out.is_contiguous()
    return contiguous and out.data_ptr() % kernels.LINE == 0 == out.shape[-1] * out.itemsize % kernels.LINE


class Joined(Decoder):
    """Tokens of several taps, the channels of one after those of the other, from the arrays of all of them by path."""

    def __init__(self, encoding: Encoding, dims: Mapping[str, int]) -> None:
        self.encoding, self.dims, self.decoded = encoding, dims, encoding.decoded  # dims: channels of each tap

    def decode_into(self, stored: Stored, out: Tensor) -> Tensor:
        for tap, part in zip(self.dims, torch.split(out, list(self.dims.values()), -1), strict=True):
            self.encoding.decode_into({array.folder: stored[array.path(tap)] for array in self.encoding.arrays}, part)
        return out

    def decode(self, stored: Stored) -> Tensor:
        values = next(iter(stored.values()))  # of the first tap
        shape = (*values.shape[:-1], sum(self.dims.values()))
        return self.decode_into(stored, torch.empty(shape, dtype=self.decoded, device=values.device))


ENCODINGS: Mapping[Dtype, Encoding] = {encoding.name: encoding for encoding in (Float16(), Int8())}


def recognised(dtypes: Mapping[str, str]) -> Dtype:
    """The form of arrays that another program made, from their types by folder.

    The folders must match, and the types decide between forms with the same folders. Without a match: float16, which
    takes any floats.
    """
    alike = [encoding for encoding in ENCODINGS.values() if {a.folder for a in encoding.arrays} == dtypes.keys()]
    same = [encoding for encoding in alike if {a.folder: a.dtype for a in encoding.arrays} == dtypes]
    return next((encoding.name for encoding in (*same, *alike)), "float16")
