"""Multi-Object Datasets: gzip streams of TFRecords, by the feature descriptions of the data sets, and HDF5 ports."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from featcache.errors import DataError, UsageError
from featcache.sources import open_source
from featcache.sources.gzip_records import GzipRecords
from featcache.sources.tfrecord import masked_crc

SIZE = {"clevr_with_masks": (240, 320), "multi_dsprites": (64, 64), "objects_room": (64, 64), "tetrominoes": (35, 35)}


def scene(name: str, seed: int, entities: int, there: int, channels: int = 3) -> dict[str, np.ndarray]:
    """Image and one-hot masks of 0 and 255 (K, H, W, 1), of which ``there`` are not empty; the background is first."""
    rng, size = np.random.default_rng(seed), SIZE[name]
    numbers = np.zeros(size, int)
    for k in range(1, there):
        top, left = rng.integers(0, size[0] - 9), rng.integers(0, size[1] - 9)
        numbers[top : top + 8, left : left + 8] = k
    masks = 255 * (numbers == np.arange(entities)[:, None, None])
    visibility = (np.arange(entities) < there).astype(np.float32)
    codes = rng.integers(1, 4, (4, entities)).astype(np.uint8)
    image = rng.integers(0, 256, (*size, channels)).astype(np.uint8)
    return {
        "numbers": numbers, "image": image, "mask": masks.astype(np.uint8)[..., None], "visibility": visibility,
        **dict(zip(("shape", "size", "color", "material"), codes, strict=True)),
    }  # fmt: skip


def example(of: dict[str, np.ndarray], *, last: bool = False, without: tuple[str, ...] = ()) -> bytes:
    """As the data sets describe them: byte arrays as strings of one byte each, reals as floats."""
    message = tf_example_pb2.Example()
    for name, values in of.items():
        if name == "numbers" or name in without:
            continue
        if name == "mask" and last:
            values = values.transpose(1, 2, 0, 3)
        if values.dtype == np.uint8:
            message.features.feature[name].bytes_list.value.extend(bytes([v]) for v in values.ravel().tolist())
        else:
            message.features.feature[name].float_list.value.extend(values.ravel().tolist())
    data: bytes = message.SerializeToString()
    return data


def stream(records: list[bytes]) -> bytes:
    """tensorflow/core/lib/io/record_writer.h, unpacked."""
    out = io.BytesIO()
    for data in records:
        length = struct.pack("<Q", len(data))
        out.write(length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data)))
    return out.getvalue()


def write(path: Path, records: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(stream(records)))
    return path


def check(video: Any, of: dict[str, np.ndarray], expected: np.ndarray) -> None:
    np.testing.assert_array_equal(video.frames[0], np.broadcast_to(of["image"], (*of["image"].shape[:2], 3)))
    np.testing.assert_array_equal(video.segmentations[0], expected)
    assert video.ignore is None


def test_clevr(tmp_path: Path) -> None:
    scenes = [scene("clevr_with_masks", seed, 11, there) for seed, there in enumerate((4, 8))]
    source = open_source(write(tmp_path / "clevr_with_masks_train.tfrecords", list(map(example, scenes))))
    assert source.splits() == ("train",) and source.lengths("train") == (1, 1) and source.size("train", 0) == (240, 320)
    for index, of in enumerate(scenes):
        video = source.read("train", index)
        check(video, of, of["numbers"])
        assert video.id == f"clevr_with_masks_train_{index:07d}"
        assert len(video.instances) == (3, 7)[index]
        for k, instance in enumerate(video.instances, start=1):
            assert instance.visibility == (int((of["numbers"] == k).sum()),)
            assert (instance.shape, instance.material) == (f"shape {of['shape'][k]}", f"material {of['material'][k]}")
    six = open_source(f"multi_object:{tmp_path}?objects=6")
    assert six.lengths("train") == (1,) and six.read("train", 0).id.endswith("0000000")
    assert open_source(f"{tmp_path}?objects=7").lengths("train") == (1, 1), "the background is no object"


def test_parts_of_the_file(tmp_path: Path) -> None:
    scenes = [scene("tetrominoes", seed, 4, 4) for seed in range(6)]
    codes = ("shape", "size", "color", "material")
    path = write(tmp_path / "tetrominoes_train.tfrecords", [example(of, without=codes) for of in scenes])
    source = open_source(f"{path}?held_out=2")
    assert source.splits() == ("train", "held_out") and len(source.lengths("train")) == 4
    check(source.read("held_out", 0), scenes[4], scenes[4]["numbers"])
    assert source.read("held_out", 1).instances[0].shape == "" and len(source.read("held_out", 1).instances) == 3
    assert source.fingerprint("train") != source.fingerprint("held_out")
    with pytest.raises(UsageError, match=r"held_out=6 leaves none of 6 scenes"):
        open_source(f"{path}?held_out=6").lengths("train")
    with pytest.raises(UsageError, match=r"no video 4 in train"):
        source.read("train", 4)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: pickle.loads(pickle.dumps(source)).read("train", i % 4).frames, range(8)))
        shared = list(pool.map(lambda i: source.read("train", i % 4).frames, range(32)))
    for i, frames in enumerate([*found, *shared]):
        np.testing.assert_array_equal(frames[0], scenes[i % 4]["image"])


def test_other_families(tmp_path: Path) -> None:
    codes = ("shape", "size", "color", "material")
    sprites = scene("multi_dsprites", 1, 4, 3, channels=1)
    path = write(tmp_path / "a/multi_dsprites_binarized.tfrecords", [example(sprites, last=True, without=codes)])
    check(open_source(path).read("train", 0), sprites, sprites["numbers"])
    room = scene("objects_room", 2, 10, 7)
    path = write(
        tmp_path / "b/objects_room_test_six_objects.tfrecords", [example(room, without=(*codes, "visibility"))]
    )
    check(open_source(path).read("test", 0), room, np.maximum(room["numbers"] - 3, 0))
    with pytest.raises(UsageError, match=r"leave objects= out"):
        open_source(f"{path}?objects=6")
    write(tmp_path / "b/objects_room_train.tfrecords", [])
    with pytest.raises(DataError, match=r"several files of scenes: objects_room_test_six_objects.tfrecords, "):
        open_source(tmp_path / "b")


def test_pixels_of_no_mask_or_of_two_are_ignored(tmp_path: Path) -> None:
    of = scene("tetrominoes", 0, 4, 3)
    of["mask"][0, 0, :3] = 0
    of["mask"][:2, 2, :4] = 255
    codes = ("shape", "size", "color", "material")
    video = open_source(write(tmp_path / "tetrominoes_train.tfrecords", [example(of, without=codes)])).read("train", 0)
    unclear = (of["mask"][..., 0] > 0).sum(0) != 1
    np.testing.assert_array_equal(video.ignore[0], unclear)
    np.testing.assert_array_equal(video.segmentations[0], np.where(unclear, 0, of["numbers"]))


def test_hdf5_ports(tmp_path: Path) -> None:
    scenes = [scene("clevr_with_masks", seed, 11, there) for seed, there in enumerate((4, 9, 7))]
    for name, masks in (("a", "mask"), ("b", "numbers")):
        path = tmp_path / name / "clevr_with_masks.hdf5"
        path.parent.mkdir()
        with h5py.File(path, "w") as file:
            for key in scenes[0]:
                values = np.stack([of[key] for of in scenes])
                if key == masks:
                    file["mask"] = values if key == "mask" else values[..., None].astype(np.uint8)
                elif key not in ("mask", "numbers"):
                    file[key] = values
        source = open_source(f"{path}?objects=6")
        assert source.lengths("train") == (1, 1)
        check(source.read("train", 1), scenes[2], scenes[2]["numbers"])
        assert source.read("train", 0).instances[2].color == f"color {scenes[0]['color'][3]}"
    with h5py.File(tmp_path / "tetrominoes.hdf5", "w") as file:
        file["pictures"] = np.zeros((2, 35, 35, 3))
    with pytest.raises(DataError, match=r"tetrominoes.hdf5: no array image in it"):
        open_source(tmp_path / "tetrominoes.hdf5").lengths("train")


def test_places_are_kept_every_so_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.sources.gzip_records.STRIDE", 3000)
    monkeypatch.setattr("featcache.sources.gzip_records.PACKED", 97)
    monkeypatch.setattr("featcache.sources.gzip_records.UNPACKED", 211)
    rng = np.random.default_rng(0)
    data = [bytes(rng.integers(0, 4, size, np.uint8)) for size in rng.integers(0, 2500, 60)]
    records = GzipRecords(write(tmp_path / "x.tfrecords", data))
    assert [found for found, _ in records.walk()] == data
    for record in rng.permutation(60):
        assert records.read(int(record)) == data[record]


def test_damage(tmp_path: Path) -> None:
    codes = ("shape", "size", "color", "material")
    good = [example(scene("tetrominoes", seed, 4, 3), without=codes) for seed in range(3)]
    path = write(tmp_path / "tetrominoes_train.tfrecords", good)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"tetrominoes_train.tfrecords: record \d is damaged.*the file ends early"):
        open_source(path).lengths("train")
    broken = bytearray(stream(good))
    broken[-100] ^= 1
    path.write_bytes(gzip.compress(bytes(broken)))
    source = open_source(path)
    source.read("train", 1)
    with pytest.raises(DataError, match=r"record 3 is damaged.*the data's checksum does not match"):
        source.read("train", 2)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"record 0 is damaged"):
        open_source(path).lengths("train")
    write(path, [example({"image": np.zeros((3, 3, 3), np.uint8)})])
    with pytest.raises(DataError, match=r"record 0: no tetrominoes in it"):
        open_source(path).read("train", 0)
