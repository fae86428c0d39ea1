"""Stored forms: each does what it declares, and a further one is a single class."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.backbones.backbone import load_backbone
from featcache.errors import IncompatibleError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.scale.recompute import recomputed_statistics
from featcache.store.encoding import ENCODINGS, FEATURES, Encoding, Stored, StoredArray
from featcache.store.reading import FeatureStore
from featcache.stream.stream import FeatureStream
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from featcache.words import Dtype
from tests.synthetic import DIM, SIZE, DiscSource, arrays_of, make_store


class Float8(Encoding):
    """e4m3 codes with a float16 scale a token: 3 bits of mantissa. As a user would add it, in one class."""

    name = "float8"  # type: ignore[assignment]
    arrays = (
        StoredArray(FEATURES, "uint8", ("patch", "feature"), 0),
        StoredArray("magnitudes", "float16", ("patch",), float("nan")),
    )
    decoded = torch.float32
    error = 0.026

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        scale = (tokens.abs().amax(-1).float() / 448).clamp_min(2.0**-24).half()
        codes = (tokens / scale.float().unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {FEATURES: codes.view(torch.uint8), "magnitudes": scale}

    def decode_into(self, stored: Stored, out: Tensor) -> Tensor:
        return out.copy_(stored[FEATURES].view(torch.float8_e4m3fn)).mul_(stored["magnitudes"].float().unsqueeze(-1))


@pytest.fixture
def float8(monkeypatch: pytest.MonkeyPatch) -> Encoding:
    monkeypatch.setitem(ENCODINGS, "float8", Float8())  # type: ignore[arg-type]
    return ENCODINGS["float8"]  # type: ignore[index]


def test_the_words_are_the_forms() -> None:
    assert get_args(Dtype) == tuple(ENCODINGS)
    assert all(encoding.name == word and encoding.arrays[0].folder == FEATURES for word, encoding in ENCODINGS.items())


@pytest.mark.parametrize("encoding", [*ENCODINGS.values(), Float8()], ids=lambda e: e.name)
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_form_does_what_it_declares(encoding: Encoding, size: float) -> None:
    tokens = size * torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    stored = encoding.encode(tokens)
    assert list(stored) == [array.folder for array in encoding.arrays]
    for array in encoding.arrays:
        values = stored[array.folder].numpy()
        assert values.dtype == array.dtype and values.shape == (3, *array.shape(5, 64))
    assert encoding.token_bytes(64) * 15 == sum(values.nbytes for values in stored.values())

    decoded = encoding.decode(stored)
    assert decoded.dtype == encoding.decoded and decoded.shape == tokens.shape
    into = torch.full(tokens.shape, torch.nan, dtype=encoding.decoded)
    assert encoding.decode_into(stored, into) is into and torch.equal(into, decoded)
    assert torch.equal(encoding.rounded(tokens), decoded)
    assert encoding.plain == (decoded.data_ptr() == stored[FEATURES].data_ptr())
    assert torch.equal(encoding.rounded(decoded), decoded), "a copy of a copy is the copy"

    error = (decoded.float() - tokens).norm(dim=-1) / tokens.norm(dim=-1)
    assert 0.3 * encoding.error < float(error.median()) < 2 * encoding.error


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_extraction_encodes_each_token_once_and_measures_what_it_stores(
    tmp_path: Path, dtype: Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    form = type(ENCODINGS[dtype])
    encode = form.encode

    def counted(self: Encoding, tokens: Tensor) -> dict[str, Tensor]:
        seen[self.name] += len(tokens)
        return encode(self, tokens)

    monkeypatch.setattr(form, "encode", counted)
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=SIZE)
    source = DiscSource({"train": (4, 3, 2)})
    options = ExtractOptions(batch_size=8, precision="float32", dtype=dtype)
    store = extract(plan(tmp_path / "s.zarr", source, backbone, options), source, backbone)
    assert seen == {dtype: 9}
    split = store["train"]
    recomputed, stored = recomputed_statistics(split, "layer1"), split.statistics("layer1")
    np.testing.assert_allclose(recomputed.covariance, stored.covariance, rtol=1e-10, atol=1e-12)
    assert recomputed.abs_max == stored.abs_max


@pytest.mark.slow
def test_a_third_form_is_one_class(tmp_path: Path, float8: Encoding) -> None:
    """Extracted, verified, streamed, recomputed, repaired, copied both ways and through HDF5."""
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=SIZE)
    source = DiscSource({"train": (4, 4, 3)})
    options = ExtractOptions(batch_size=4, precision="float32", dtype="float8")  # type: ignore[arg-type]
    path = tmp_path / "s.zarr"
    extract(plan(path, source, backbone, options), source, backbone)
    store, whole = FeatureStore.open(path), arrays_of(path)
    split = store["train"]
    assert verify(path) == []
    expected = float8.rounded(backbone(backbone.preprocess(torch.from_numpy(source.read("train", 1).frames)))["layer1"])
    torch.testing.assert_close(split.tokens("layer1", 1), expected, rtol=0.13, atol=1e-3)  # another batch, a code off
    moments = recomputed_statistics(split, "layer1")
    np.testing.assert_allclose(moments.covariance, split.statistics("layer1").covariance, rtol=1e-9, atol=1e-12)
    for residence in ("disk", "host"):
        batch = next(iter(FeatureStream(split, "layer1", batch_size=5, clip=2, residence=residence)))
        assert batch.features.dtype == torch.float32
        for sample, row in zip(batch.features, batch.rows.tolist(), strict=True):
            assert torch.equal(sample, split.read_tokens("layer1", slice(row, row + 2)))

    next(split.path.glob("features/layer1/c.*")).unlink()
    assert repair(path, Means(data=source, backbone=backbone)) and arrays_of(path) == whole

    convert(path, tmp_path / "half.zarr", ConvertOptions(dtype="float16"))
    half = FeatureStore.open(tmp_path / "half.zarr")
    assert half.spec.dtype_through == "float8"
    assert torch.equal(half["train"].tokens("layer1", 2), split.tokens("layer1", 2).half())
    convert(path, tmp_path / "s.h5", ConvertOptions(), "hdf5")
    convert(tmp_path / "s.h5", tmp_path / "back.zarr", ConvertOptions())
    assert {n: d for n, d in arrays_of(tmp_path / "back.zarr").items() if n != "zarr.json"} == {
        n: d for n, d in whole.items() if n != "zarr.json"
    }


@pytest.mark.parametrize(
    ("ways", "through"),
    [(("int8", "float16"), "int8"), (("int8", "float16", "int8"), ""), (("float8", "int8", "float16"), "float8")],
)
def test_a_copy_names_the_coarsest_form_on_its_way(
    tmp_path: Path, float8: Encoding, ways: tuple[Dtype, ...], through: str
) -> None:
    path = make_store(tmp_path / "0.zarr", DiscSource({"train": (2,)}), dtype=ways[0]).path
    for number, dtype in enumerate(ways[1:], 1):
        convert(path, tmp_path / f"{number}.zarr", ConvertOptions(dtype=dtype))
        path = tmp_path / f"{number}.zarr"
    assert FeatureStore.open(path).spec.dtype_through == through


def test_another_program_s_int8_is_recognised(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    tokens = torch.randn(4, 9, DIM, generator=torch.Generator().manual_seed(0))
    stored = ENCODINGS["int8"].encode(tokens)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["features/dino"] = stored["features"].numpy()
        file["scales/dino"] = stored["scales"].float().numpy()  # a wider type than ours
        file["video"] = np.zeros((4, 8, 8, 3), np.uint8)
        file["video_offsets"] = [0, 4]
    convert(tmp_path / "other.h5", tmp_path / "b.zarr", ConvertOptions())
    copied = FeatureStore.open(tmp_path / "b.zarr")
    assert copied.spec.dtype == "int8" and verify(copied.path) == []
    assert torch.equal(copied["train"].tokens("dino", 0), ENCODINGS["int8"].decode(stored))


def test_a_form_of_a_later_version_is_refused(store: FeatureStore) -> None:
    document = json.loads((store.path / "zarr.json").read_text())
    document["attributes"]["featcache"]["dtype"] = "int4"
    (store.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(IncompatibleError, match=r"stored as int4, this version reads float16, int8; use the version"):
        FeatureStore.open(store.path)
