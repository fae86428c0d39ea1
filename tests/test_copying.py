"""Copies and scaling past the caches: every byte, and not one more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.memory import kernels
from featcache.memory.copying import CHECK, Copier
from featcache.memory.pages import host_empty
from featcache.sources.video import Video
from featcache.store.encoding import ENCODINGS
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.store.writing import StoreWriter
from featcache.stream.stream import FeatureStream
from featcache.words import Dtype
from slotlab.commands import doctor


@pytest.fixture(params=["llvmlite", "neither"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the compiled loops, and without the package that compiles them."""
    if request.param == "neither":
        for module in ("llvmlite", "llvmlite.binding"):
            monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    for kernel in (kernels.copy, kernels.dequantise):
        kernel.cache_clear()
    assert (kernels.dequantise() is None) == (request.param == "neither")
    yield request.param
    for kernel in (kernels.copy, kernels.dequantise):
        kernel.cache_clear()


@pytest.mark.parametrize("dtype", ENCODINGS)
def test_a_large_batch_streams_with_and_without_compiled_loops(tmp_path: Path, dtype: Dtype, loops: str) -> None:
    """Of 16 MB and more, for which the loops are."""
    spec = StoreSpec("synthetic", {"library": "none"}, {"size": 8}, {"block1": TapSpec((16, 16), 384)}, dtype)
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(tmp_path / "s.zarr", spec) as writer:
        part = writer.split("heldout", SplitSpec("f", (16, 16), 16, (8, 8), False))
        for video in range(2):
            frames = Video(str(video), np.zeros((16, 8, 8, 3), np.uint8), None, ())
            part.write(video, frames, {"block1": torch.randn(16, 256, 384, generator=generator)})
        part.finish({})
        part.close()
    split = FeatureStore.open(tmp_path / "s.zarr")["heldout"]
    batch = next(iter(FeatureStream(split, "block1", batch_size=100, residence="disk")))
    assert batch.features.nbytes > kernels.PAST_CACHES
    everything = torch.cat([split.tokens("block1", video) for video in split.videos])
    assert torch.equal(batch.features, everything[torch.from_numpy(batch.rows)])


def test_doctor_says_what_the_extra_would_give(loops: str) -> None:
    found = doctor.examine()["llvmlite"]
    assert found == doctor.WITHOUT_LLVMLITE if loops == "neither" else found[0].isdigit()


def scaled(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return ENCODINGS["int8"].decode_into({"features": codes, "scales": scale}, out)


@given(
    sizes=st.lists(st.one_of(st.integers(1, 20).map(lambda lines: 64 * lines), st.integers(1, 900)), max_size=50),
    threads=st.integers(1, 3),
    past_caches=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_copies_are_exact(sizes: list[int], threads: int, past_caches: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = rng.integers(1, 256, 1 << 12).astype(np.uint8)
    target = host_empty((sum(size + 64 for size in sizes) + 64,), torch.uint8).zero_().numpy()
    expected, pieces, place = target.copy(), [], -target.ctypes.data % 64
    for size in sizes:
        begin = int(rng.integers(0, len(source) - size))
        expected[place : place + size] = source[begin : begin + size]
        pieces.append((target.ctypes.data + place, source.ctypes.data + begin, size))
        place += size  # the next one starts on a line, or not
    left: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PAST_CACHES", 0 if past_caches else 1 << 40)
        Copier(threads)(pieces, lambda rest: left.append(len(rest)))
    assert np.array_equal(target, expected)
    mine = -(-len(pieces) // threads)
    assert left == [max(0, mine - done) for done in range(CHECK, mine + CHECK, CHECK)]


@pytest.mark.parametrize("size, copies", [(64, ["lines"]), (96, ["libc"])])
def test_only_whole_lines_go_past_the_caches(size: int, copies: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(kernels, "PAST_CACHES", 64)
    monkeypatch.setattr(kernels, "copy", lambda: lambda *_: used.append("lines"))
    monkeypatch.setattr("ctypes.memmove", lambda *_: used.append("libc"))
    Copier()([(1 << 12, 5, size)])
    assert used == copies
    Copier()([(1 << 12, 5, 32)])  # a small batch stays in the caches
    assert used == [*copies, "libc"]


@pytest.mark.parametrize("shape", [(5, 100, 16), (3, 2, 70, 384), (2, 50, 24), (7, 16)])
@pytest.mark.parametrize("past_caches", [0, 1 << 40])
def test_scaling_is_the_product(
    shape: tuple[int, ...], past_caches: int, loops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PAST_CACHES", past_caches)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(shape[:-1]).half()
    held = torch.full((codes.numel() + 64,), 7.0)
    out = held[16 : 16 + codes.numel()].view(shape)
    assert torch.equal(scaled(codes, scale, out), codes.float() * scale.float().unsqueeze(-1))
    assert (held[:16] == 7).all() and (held[16 + codes.numel() :] == 7).all()


@pytest.mark.parametrize("dim, offset, compiles", [(16, 0, True), (24, 0, False), (16, 1, False)])
def test_only_aligned_values_are_scaled_past_the_caches(
    dim: int, offset: int, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(kernels, "dequantise", lambda: lambda *arguments: used.append(arguments[-1]))
    codes, scale = torch.ones((8, dim), dtype=torch.int8), torch.ones(8).half()
    out = host_empty((8 * dim + 1,), torch.float32)[offset : offset + 8 * dim].view(8, dim)
    for past_caches in (out.nbytes, out.nbytes + 1):
        monkeypatch.setattr(kernels, "PAST_CACHES", past_caches)
        scaled(codes, scale, out)
    assert used == [dim] * compiles


def test_parts_of_a_tensor_are_scaled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PAST_CACHES", 0)
    codes = torch.randint(-127, 128, (4, 32, 8), dtype=torch.int8).transpose(1, 2)
    scale = torch.rand(8, 4).half().T
    expected = codes.float() * scale.float().unsqueeze(-1)
    assert torch.equal(scaled(codes, scale, torch.zeros(4, 8, 32)), expected)
    wide = torch.zeros(4, 8, 64)[..., :32]
    assert torch.equal(scaled(codes.contiguous(), scale, wide), expected)
