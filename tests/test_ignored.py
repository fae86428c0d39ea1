"""Pixels and frames whose truth is not known: they are stored and copied as that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
from PIL import Image

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.sources import open_source
from featcache.sources.masks import unlabelled_instances
from featcache.sources.video import Instance, Video
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from featcache.upkeep.convert import ConvertOptions, convert
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from tests.media import oblong, save_images
from tests.synthetic import PARTLY, DiscSource, PartlyKnown, arrays_of, make_store

FIXED = ExtractOptions(batch_size=4, precision="float32")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store that the tests only read."""
    return make_store(tmp_path_factory.mktemp("ignored") / "s.zarr", PartlyKnown(), chunk_frames=4)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


def extracted(path: Path, source: Any, backbone: Backbone, options: ExtractOptions = FIXED) -> FeatureStore:
    return extract(plan(path, source, backbone, options), source, backbone)


def assert_kept(store: FeatureStore) -> None:
    source = PartlyKnown()
    assert verify(store.path) == []
    for name, index in ((name, index) for name, lengths in PARTLY.items() for index in range(len(lengths))):
        split, video, known = store[name], source.read(name, index), source.known(name, index)
        np.testing.assert_array_equal(split.ignored(index), ~known)
        np.testing.assert_array_equal(split.labelled(index), known.any((1, 2)))
        np.testing.assert_array_equal(split.segmentations(index), video.segmentations)
        assert split.instances(index) == video.instances and split.has_truth


# -- the store ---------------------------------------------------------------------------------------------


def test_a_store_keeps_what_is_not_known(kept: FeatureStore) -> None:
    assert_kept(kept)
    data = xarray.open_zarr(str(kept.path), group="validation", consolidated=False, zarr_format=3)["ignored"]
    assert data.dims == ("frame", "y", "x") and data.dtype == bool
    split = kept["validation"]
    assert not data.values[np.setdiff1d(np.arange(split.spec.rows), split.valid_rows())].any()


@pytest.mark.parametrize(("dtype", "shard_videos"), [("int8", 0), ("float16", 2)])
def test_copies_keep_it(tmp_path: Path, kept: FeatureStore, dtype: Any, shard_videos: int) -> None:
    convert(kept.path, tmp_path / "copy.zarr", ConvertOptions(dtype=dtype, shard_videos=shard_videos))
    assert_kept(FeatureStore.open(tmp_path / "copy.zarr"))


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "by other code"])
def test_hdf5_keeps_it(tmp_path: Path, kept: FeatureStore, foreign: bool) -> None:
    convert(kept.path, tmp_path / "s.h5", ConvertOptions(), "hdf5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        assert file["validation/ignored"].dtype == bool
        for group in file.values() if foreign else ():
            del group.attrs["featcache"]
            values = group["ignored"][:].astype(np.int32) * 7
            del group["ignored"], group["checksums"]
            group["ignored"] = values
    convert(tmp_path / "s.h5", tmp_path / "back.zarr", ConvertOptions())
    assert_kept(FeatureStore.open(tmp_path / "back.zarr"))


def test_hdf5_of_another_shape_is_refused(tmp_path: Path, kept: FeatureStore) -> None:
    convert(kept.path, tmp_path / "s.h5", ConvertOptions(), "hdf5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        del file["train/ignored"]
        file["train/ignored"] = np.zeros((10, 3, 3), bool)
    with pytest.raises(DataError, match=r"/train: ignored are \(10, 3, 3\); expected \(10, 32, 32\), like the video"):
        convert(tmp_path / "s.h5", tmp_path / "back.zarr", ConvertOptions())


class Breaks(PartlyKnown):
    """Stops an extraction at the last video of the first split."""

    def read(self, split: str, index: int) -> Video:
        if (split, index) == ("train", 2):
            raise KeyboardInterrupt
        return super().read(split, index)


def test_an_extraction_that_broke_off_resumes_to_the_same_bytes(tmp_path: Path, backbone: Backbone) -> None:
    whole = extracted(tmp_path / "whole.zarr", PartlyKnown(), backbone)
    assert_kept(whole)
    with pytest.raises(KeyboardInterrupt):
        extracted(tmp_path / "s.zarr", Breaks(), backbone)
    broken = FeatureStore.open(tmp_path / "s.zarr")
    assert "validation" not in broken.splits and not broken["train"].complete and verify(broken.path) == []
    assert arrays_of(extracted(broken.path, PartlyKnown(), backbone).path) == arrays_of(whole.path)


@pytest.mark.parametrize("damage", ["train/ignored/c.0.0.0", "train/ignored/zarr.json", "train/zarr.json"])
def test_damage_is_found_and_repaired(tmp_path: Path, backbone: Backbone, damage: str) -> None:
    path = extracted(tmp_path / "s.zarr", PartlyKnown(), backbone).path
    before = arrays_of(path)
    (path / damage).write_bytes((path / damage).read_bytes()[:-2])
    assert [d.what.split()[0] for d in verify(path)] == [damage]
    repair(path, Means(data=PartlyKnown(), backbone=backbone))
    assert arrays_of(path) == before
    assert_kept(FeatureStore.open(path))


@pytest.mark.parametrize("frame_size", [None, 16])
def test_margins_and_other_sizes(tmp_path: Path, frame_size: int | None) -> None:
    wide = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=(32, 64))
    options = replace(FIXED, fit="pad", frame_size=frame_size)
    split = extracted(tmp_path / "s.zarr", PartlyKnown(), wide, options)["validation"]
    for video in split.videos:
        ignored = np.ones((PARTLY["validation"][video], 32, 64), bool)
        ignored[:, :, 16:48] = ~PartlyKnown().known("validation", video)
        if frame_size:
            whole = [Image.fromarray(frame.astype(np.uint8)) for frame in ignored]
            ignored = np.stack([np.asarray(image.resize((32, 16), Image.Resampling.NEAREST)) for image in whole]) > 0
        labelled = PartlyKnown().known("validation", video).any((1, 2))
        ignored[~labelled] = True
        np.testing.assert_array_equal(split.ignored(video), ignored)
        for number, instance in enumerate(split.instances(video), 1):
            assert instance.visibility == tuple((split.segmentations(video) == number).sum((1, 2)).tolist())


def test_visibility_counts_known_pixels_whatever_the_source_counts(tmp_path: Path, backbone: Backbone) -> None:
    class Counted(PartlyKnown):
        """Its records count each object whole, as those of MOVi do."""

        def read(self, split: str, index: int) -> Video:
            video, whole = super().read(split, index), DiscSource.read(self, split, index)
            return replace(video, instances=whole.instances)

    assert_kept(extracted(tmp_path / "s.zarr", Counted(), backbone))


# -- stores of earlier versions ----------------------------------------------------------------------------


def test_a_store_of_an_earlier_version_has_no_such_array(
    tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resumed as it is, also with a split that it lacked, and takes no video that needs the array."""
    source = DiscSource(PARTLY)
    with monkeypatch.context() as earlier:
        earlier.setattr("featcache.extraction.plan.SCHEMA", 1)
        whole = extracted(tmp_path / "whole.zarr", source, backbone)
        extracted(tmp_path / "s.zarr", source, backbone, replace(FIXED, splits=("train",), max_videos=2))
        extracted(tmp_path / "other.zarr", source, backbone, replace(FIXED, splits=("train",)))
    store = extracted(tmp_path / "s.zarr", source, backbone)
    assert store.spec.schema == 1 and not list(store.path.glob("*/ignored")) and verify(store.path) == []
    chunks = [{name: data for name, data in arrays_of(s.path).items() if "/c" in name} for s in (store, whole)]
    assert chunks[0] == chunks[1]
    split = store["validation"]
    assert not split.ignored(0).any() and split.labelled(0).tolist() == [True] * 10 and split.has_truth
    convert(store.path, tmp_path / "s.h5", ConvertOptions(), "hdf5")
    convert(tmp_path / "s.h5", tmp_path / "back.zarr", ConvertOptions())
    back = FeatureStore.open(tmp_path / "back.zarr")
    assert back.spec.schema == 1 and not list(back.path.glob("*/ignored"))
    with pytest.raises(DataError, match="truth is not known, and the store, by an earlier.* to another --out"):
        extracted(tmp_path / "other.zarr", PartlyKnown(), backbone)


def test_the_number_alone_refuses_no_store(tmp_path: Path, kept: FeatureStore) -> None:
    assert kept.spec.schema == 2
    for schema in (1, 2):
        StoreWriter(tmp_path / "s.zarr", replace(kept.spec, schema=schema)).close()
    assert FeatureStore.open(tmp_path / "s.zarr").spec.schema == 1


def test_a_folder_as_pascal_voc_has_it(tmp_path: Path, backbone: Backbone) -> None:
    """Palette masks with void between the objects, and an image without a mask."""
    save_images(tmp_path / "voc", oblong(3), ["a.png", "b.png", "c.png"])
    (tmp_path / "voc/masks").mkdir()
    numbers = np.zeros((48, 64), np.uint8)
    numbers[8:40, 8:30], numbers[10:14, 10:20], numbers[8:40, 30:34] = 1, 255, 255
    for name in "ab":
        image = Image.frombytes("P", (64, 48), numbers.tobytes())
        image.putpalette([0, 0, 0, 128, 0, 0, *[9] * (3 * 253), 224, 224, 192])
        image.save(tmp_path / f"voc/masks/{name}.png")
    split = extracted(tmp_path / "s.zarr", open_source(tmp_path / "voc"), backbone)["train"]
    for video, known in ((0, True), (1, True), (2, False)):
        np.testing.assert_array_equal(split.ignored(video)[0], numbers == 255 if known else np.ones_like(numbers, bool))
        assert split.labelled(video).tolist() == [known]
    objects = (Instance(visibility=(32 * 22 - 4 * 10,)),)
    assert split.instances(0) == objects == unlabelled_instances(np.where(numbers == 255, 0, numbers)[None])
