"""The backbone that made a store: found again where the store says, and refused when it is another."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from featcache.backbones.backbone import load_backbone
from featcache.errors import DataError, IncompatibleError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.extraction.store_backbone import refuse_other_backbone, store_backbone
from featcache.store.reading import FeatureStore
from tests.synthetic import SIZE, DiscSource


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    backbone = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=SIZE)
    save_file(backbone._tower.model.state_dict(), file)
    return file


@pytest.fixture
def made(tmp_path: Path, weights: Path) -> FeatureStore:
    source = DiscSource({"train": (2,)})
    backbone = load_backbone("resnet18", weights=str(weights), taps=("layer1",), input_size=SIZE)
    options = ExtractOptions(batch_size=2, precision="float32")
    return extract(plan(tmp_path / "store.zarr", source, backbone, options), source, backbone)


def test_weights_are_known_by_what_they_hold_not_by_their_name(made: FeatureStore, weights: Path) -> None:
    again = store_backbone(made)
    assert again.taps == ("layer1",) and again.input_size == SIZE
    moved = weights.rename(weights.with_name("moved.safetensors"))
    try:
        with pytest.raises(DataError, match=r"weights.safetensors: .* are gone; name them with --weights"):
            store_backbone(made)
        assert store_backbone(made, weights=str(moved)).provenance["weights_tag"] == "file:moved.safetensors"
    finally:
        moved.rename(weights)


def test_another_backbone_is_refused(made: FeatureStore, weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, other)
    with pytest.raises(IncompatibleError, match=r"store.zarr: made with another backbone \(model.weights_sha256: "):
        store_backbone(made, weights=str(other))
    lacks = load_backbone("resnet18", weights=str(weights), taps=("layer2",), input_size=SIZE)
    with pytest.raises(IncompatibleError, match=r"taps.layer1.dim: store 64, asked None"):
        refuse_other_backbone(made, lacks)
