"""Verification finds every kind of damage and names the videos; repair makes again those alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr

from featcache.backbones.backbone import Backbone, load_backbone
from featcache.errors import DataError, IncompatibleError
from featcache.extraction.extract import extract
from featcache.extraction.plan import ExtractOptions, plan
from featcache.store import manifest
from featcache.store.layout import chunk_path
from featcache.store.reading import FeatureStore
from featcache.store.writing import StoreWriter
from featcache.upkeep.repair import Means, repair
from featcache.upkeep.verify import verify
from tests.synthetic import DiscSource, make_store

CHUNK = "train/features/layer1/c.1.0.0"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("resnet18", weights="random", taps=("layer1",), input_size=32)


def extracted(path: Path, backbone: Backbone, **options: int) -> Path:
    source = DiscSource()
    asked = replace(ExtractOptions(batch_size=3, precision="float32"), **options)
    extract(plan(path, source, backbone, asked), source, backbone)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> Path:
    return extracted(tmp_path_factory.mktemp("stores") / "sound.zarr", backbone)


@pytest.fixture
def path(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s.zarr"))


def contents(path: Path) -> dict[str, object]:
    """Every file's bytes, and the manifest's rows whatever their order."""
    files = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file() and f.name != ".lock"}
    return {
        name: manifest.read(file.parent) if file.name == manifest.NAME else file.read_bytes()
        for name, file in files.items()
    }


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def drop_line(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))


def break_line(file: Path) -> None:
    file.write_bytes(b"\xff{" + file.read_bytes()[2:])


def other_shape(file: Path) -> None:
    document = json.loads(file.read_text())
    document["shape"][1] += 1
    file.write_text(json.dumps(document))


def not_finite(file: Path) -> None:
    zarr.open_array(str(file), mode="r+")[0] = np.nan


def remove(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


DAMAGES: list[tuple[Callable[[Path], object], str, set[int | None], str]] = [
    (flip, CHUNK, {1}, "has checksum"),
    (cut, CHUNK, {1}, "has checksum"),
    (remove, CHUNK, {1}, "is missing"),
    (flip, "train/video/c.4.0.0.0", {4}, "has checksum"),
    (remove, "train/segmentations/c.0.0.0", {0}, "is missing"),
    (remove, "train/features/layer1/zarr.json", {None}, "layer1/zarr.json is missing"),
    (other_shape, "train/video/zarr.json", {None}, "has shape (20, 33, 32, 3), not (20, 32, 32, 3)"),
    (cut, "train/segmentations/zarr.json", {None}, "is damaged"),
    (remove, "train/features/zarr.json", {None}, "features/zarr.json is missing"),
    (remove, "train/zarr.json", {None}, "train/zarr.json is missing or damaged"),
    (cut, "train/zarr.json", {None}, "train/zarr.json is missing or damaged"),
    (remove, "train/features/layer1", {0, 1, 2, 3, 4, None}, "is missing"),
    (lambda file: file.write_bytes(b"x"), "train/features/layer1/c.5.0.0", {None}, "does not belong there"),
    (flip, "train/frame_video/c/0", {None}, "frame_video"),
    (remove, "train/instances", {None}, "instances/material"),
    (remove, "train/statistics/layer1/max", {None}, "statistics/layer1 cannot be read"),
    (not_finite, "train/statistics/layer1/max", {None}, "are not finite"),
    (flip, "train/statistics/layer1/within/c/0/0", {None}, "statistics/layer1"),
    (drop_line, "train/manifest.jsonl", {0, None}, "is not in the manifest"),
    (break_line, "train/manifest.jsonl", {0, None}, "line 1 is no row"),
    (remove, "train/manifest.jsonl", {None}, "manifest.jsonl is missing"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "file", "videos", "what"), DAMAGES, ids=[f"{d[0].__name__}-{d[1]}" for d in DAMAGES]
)
def test_damage_is_named_and_repaired_byte_for_byte(
    sound: Path,
    path: Path,
    backbone: Backbone,
    damage: Callable[[Path], object],
    file: str,
    videos: set[int],
    what: str,
) -> None:
    written = {f: f.stat().st_mtime_ns for f in path.rglob("c.*")}
    damage(path / file)
    found = verify(path)
    assert {d.video for d in found} == videos and {d.split for d in found} == {"train"}
    assert any(what in d.what for d in found), [d.what for d in found]
    repair(path, Means(data=DiscSource(), backbone=backbone))
    assert verify(path) == []
    assert contents(path) == contents(sound)
    if file.endswith(manifest.NAME) and damage is remove:
        return  # nothing vouched for any video
    rewritten = {f for f, when in written.items() if f.stat().st_mtime_ns != when}
    numbers = {int(f.name.split(".")[1]) for f in rewritten}
    assert numbers <= videos and all("train" in f.parts for f in rewritten), "sound videos were written again"


def test_a_sound_store_is_left_alone(sound: Path) -> None:
    before = contents(sound)
    assert verify(sound) == [] and repair(sound) == [] and contents(sound) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_damage_whatever_their_checksum(path: Path, value: float) -> None:
    split = FeatureStore.open(path)["train"]
    file = chunk_path(split.path / "features/layer1", 2, 3)
    values = np.frombuffer(file.read_bytes(), np.float16).copy()
    values[7] = value
    file.write_bytes(values.tobytes())
    rows = dict(split.manifest)
    sums = {**rows[2].crc32c, "features/layer1": (google_crc32c.value(values.tobytes()),)}
    manifest.replace_rows(split.path, {**rows, 2: replace(rows[2], crc32c=sums)})
    (found,) = verify(path)
    assert (found.video, found.id) == (2, "train-2") and "1 non-finite values" in found.what


def test_a_value_in_the_padding_is_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", DiscSource({"train": (4, 3)}))
    file = chunk_path(store.path / "train/features/block1", 1, 3)
    data = bytearray(file.read_bytes())
    data[-2:] = b"\0\0"
    file.write_bytes(data)
    rows = store["train"].manifest
    sums = {**rows[1].crc32c, "features/block1": (google_crc32c.value(bytes(data)),)}
    manifest.replace_rows(store.path / "train", {**rows, 1: replace(rows[1], crc32c=sums)})
    assert [d.what for d in verify(store.path)] == ["train/features/block1/c.1.0.0 has values in its padding"]


def test_metadata_by_another_writer_of_the_same_meaning_is_sound(path: Path) -> None:
    file = path / "train/features/layer1/zarr.json"
    document = json.loads(file.read_text())
    del document["storage_transformers"]
    file.write_text(json.dumps(dict(sorted(document.items()))))
    assert verify(path) == []


def test_damage_in_an_unfinished_split_is_forgotten_and_left_to_extract(
    tmp_path: Path, sound: Path, backbone: Backbone
) -> None:
    path = extracted(tmp_path / "s.zarr", backbone, max_videos=2)
    store = FeatureStore.open(path)
    with StoreWriter(path, store.spec) as writer:  # grown, and killed before the first new video
        writer.split("train", FeatureStore.open(sound)["train"].spec).close()
    flip(path / CHUNK)
    repair(path)  # needs neither source nor backbone
    assert FeatureStore.open(path)["train"].videos == (0,)
    assert contents(extracted(path, backbone)) == contents(sound)


@pytest.mark.slow
def test_repair_forgets_nothing_that_it_cannot_make_again(path: Path, backbone: Backbone) -> None:
    flip(path / CHUNK)
    before = contents(path)
    with pytest.raises(DataError, match="synthetic discs: no such file or folder.*name where it is now with --data"):
        repair(path, Means(backbone=backbone))
    other = DiscSource({"train": (4, 3, 3, 4, 2), "validation": (4, 4)})
    with pytest.raises(IncompatibleError, match=r"synthetic discs does not hold its videos \(train_00001: store "):
        repair(path, Means(data=other, backbone=backbone))
    larger = load_backbone("resnet18", weights="random", taps=("layer1",), input_size=64)
    with pytest.raises(IncompatibleError, match="preprocessing.size: store 32, asked 64"):
        repair(path, Means(data=DiscSource(), backbone=larger))
    assert contents(path) == before


def test_weights_are_found_again_where_the_store_says(path: Path, sound: Path) -> None:
    flip(path / CHUNK)
    repair(path, Means(data=DiscSource()))  # random weights, by their seed
    assert contents(path) == contents(sound)


@pytest.mark.parametrize(("damage", "message"), [(remove, "missing, and with it"), (cut, "damaged, and with it")])
def test_a_lost_root_is_refused(path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(path / "zarr.json")
    with pytest.raises(DataError, match=f"zarr.json: {message} the specification of the features; put back a copy"):
        verify(path)


def test_readers_say_what_is_damaged_and_what_to_do(path: Path) -> None:
    remove(path / "train/features/layer1/zarr.json")
    split = FeatureStore.open(path)["train"]
    with pytest.raises(DataError, match="features/layer1/zarr.json: missing or damaged; run: slotlab verify --repair"):
        split.tokens("layer1", 0)
    remove(path / "train/zarr.json")
    with pytest.raises(DataError, match="train/zarr.json: missing or damaged; run: slotlab verify --repair"):
        FeatureStore.open(path)["train"]
