"""The embedded sample is whole, reads as MOVi, and is what its own metadata says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from featcache.errors import DataError
from featcache.sources import SAMPLE, open_source
from featcache.sources.masks import visibility
from featcache.sources.movi import MoviSource
from featcache.sources.sample import sample_dir
from featcache.sources.tfrecord import TFRecordFile
from tests.movi_files import write_movi

REPOSITORY = Path(__file__).parents[1]


def test_counts_and_lengths() -> None:
    source = open_source()
    assert source.location == SAMPLE
    assert source.splits() == ("train", "validation")
    assert list(source.lengths("train")) == [24] * 60
    assert list(source.lengths("validation")) == [24] * 24
    assert source.fingerprint("train") != source.fingerprint("validation")


@pytest.mark.slow
def test_every_video_reads_and_visibility_is_the_masks_pixel_count() -> None:
    source = open_source()
    names, materials = set(), {"train": 0, "validation": 0}
    for split in source.splits():
        for index in range(len(source.lengths(split))):
            video = source.read(split, index)
            names.add(video.id)
            assert video.frames.shape == (24, 256, 256, 3)
            assert video.segmentations is not None
            assert 3 <= len(video.instances) <= 10
            assert all(i.shape and i.size and i.color and i.material in ("metal", "rubber") for i in video.instances)
            counted = visibility(video.segmentations, len(video.instances))
            np.testing.assert_array_equal([i.visibility for i in video.instances], counted)
            assert video.segmentations.max() <= len(video.instances)
            materials[split] += all(i.material == "metal" for i in video.instances)
    assert len(names) == 84
    assert materials == {"train": 22, "validation": 9}  # as data/README.md says


def test_objects_show_in_the_frames_where_the_masks_put_them() -> None:
    """Frames and masks of one record belong together: colours differ more across mask edges than within."""
    video = open_source().read("validation", 0)
    assert video.segmentations is not None
    change = np.abs(np.diff(video.frames.astype(int), axis=2)).sum(-1)
    edge = np.diff(video.segmentations.astype(int), axis=2) != 0
    assert change[edge].mean() > 5 * change[~edge].mean()


def test_metadata_agrees_with_the_files() -> None:
    info = json.loads((sample_dir() / "dataset_info.json").read_text())
    for split in info["splits"]:
        files = [TFRecordFile.open(p) for p in sorted(sample_dir().glob(f"movi_a-{split['name']}.tfrecord-*"))]
        assert [len(file) for file in files] == [int(n) for n in split["shardLengths"]]
        assert sum(int(file.lengths.sum()) for file in files) == int(split["numBytes"])
        assert all(file.path.stat().st_size < 5e6 for file in files)


def test_tfds_accepts_the_folder_and_reads_the_same() -> None:
    pytest.importorskip("tensorflow")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(sample_dir()))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 60, "validation": 24}
    ours = open_source().read("validation", 23)
    theirs = open_source(f"tfds:movi_a/256x256?data_dir={sample_dir().parents[2]}").read("validation", 23)
    assert theirs.id == ours.id and theirs.instances == ours.instances
    np.testing.assert_array_equal(theirs.segmentations, ours.segmentations)
    # TensorFlow's JPEG decoder uses another inverse DCT.
    assert np.abs(theirs.frames.astype(int) - ours.frames).mean() < 1


def test_missing_sample_says_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("featcache.sources.sample.__file__", str(tmp_path / "featcache" / "sources" / "sample.py"))
    with pytest.raises(DataError, match="clone of the repository"):
        sample_dir()
    packed = tmp_path / "featcache" / "_sample" / "movi_a" / "256x256" / "1.0.0"
    packed.mkdir(parents=True)
    (packed / "features.json").touch()
    assert sample_dir() == packed


def make_sample() -> ModuleType:
    path = REPOSITORY / "data" / "make_sample.py"
    if not path.is_file():
        pytest.skip("not in a clone of the repository")
    spec = importlib.util.spec_from_file_location("make_sample", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_make_sample_keeps_masks_and_values(tmp_path: Path) -> None:
    source = write_movi(tmp_path / "source", {"train": 5, "validation": 2})
    target = tmp_path / "target"
    make_sample().make(source, target, quality=92, limit=10_000)
    old, new = MoviSource(source), MoviSource(target)
    assert len(list(target.glob("movi_a-train.tfrecord-*"))) > 1
    for split in old.splits():
        assert new.lengths(split) == old.lengths(split)
        for index in range(len(old.lengths(split))):
            a, b = old.read(split, index), new.read(split, index)
            assert a.id == b.id and a.instances == b.instances
            np.testing.assert_array_equal(a.segmentations, b.segmentations)
            assert 0 < np.abs(a.frames.astype(int) - b.frames).mean() < 8
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    make_sample().make(source, target, quality=92, limit=10_000)
    assert before == {path.name: path.read_bytes() for path in target.iterdir()}
