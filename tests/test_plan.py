"""Plans: exact where they say bytes, by hand where they say seconds, and the trainer's own choice of a home."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache.backbones.backbone import load_backbone, outline
from featcache.errors import UsageError
from featcache.sources.video import Source
from featcache.store.encoding import ENCODINGS
from featcache.store.reading import FeatureStore
from featcache.store.spec import SplitSpec, StoreSpec, TapSpec
from featcache.stream.residence import SPARE, Free, ring_bytes
from featcache.stream.stream import VIDEO
from featcache.upkeep.convert import ConvertOptions
from featcache.upkeep.ranks import export_for_ranks
from featcache.words import Dtype
from slotlab.config.load import load_config
from slotlab.models.inputs import TRACKS, ModelInput
from slotlab.planning import devices
from slotlab.planning.bound import LAUNCH, UTILISATION, Bound
from slotlab.planning.data import DataSet
from slotlab.planning.devices import DEVICES, HERE, Device, find_device, measured
from slotlab.planning.extraction import count_pass, plan_extraction
from slotlab.planning.plan import TrainingPlan, largest_batch, make_plan
from slotlab.training.cost import Cost, Work, count_step
from slotlab.training.processes import Ranks
from slotlab.training.train import training_stream
from tests.commands import Slotlab
from tests.synthetic import DIM, GRID, SIZE, DiscSource, fitted, make_store
from tests.test_step import shortened
from tests.training import tracked, tracks_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CARD = DEVICES["rtx5090"]


def movi_a(videos: int = 9703) -> DataSet:
    spec = StoreSpec("dinov2_vits14", {}, {}, {"block12": TapSpec((16, 16), 384)})
    return DataSet("MOVi-A", spec, {"train": SplitSpec("", (24,) * videos, 24, (256, 256), True)})


def planned(preset: str, data: DataSet, device: Device, *overrides: str, dtype: Dtype = "int8") -> TrainingPlan:
    return make_plan(load_config(preset, None, overrides), data, device, [dtype]).training[0]


STEP = Cost({Work(10**9, 10**6, torch.float32): 10}, peak=3 * 10**6, state=10**6, parameters=100)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step costs the same: counting has its own tests, and takes seconds."""
    for module in ("slotlab.planning.plan", "slotlab.training.train"):
        monkeypatch.setattr(f"{module}.count_step", lambda *_, **__: STEP)


def size_of(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


# -- disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ENCODINGS)
def test_bytes_of_tokens_are_those_of_the_files(tmp_path: Path, dtype: Dtype) -> None:
    """Of videos of several lengths, chunks that they do not fill, and two taps."""
    source = DiscSource({"train": (7, 3, 4), "validation": (2,)})
    store = make_store(tmp_path / "store.zarr", source, dtype=dtype, chunk_frames=4, taps=("block1", "block2"))
    data = DataSet.of_store(store)
    for tap in (None, "block1", "block2"):
        for split in (None, "train", "validation"):
            chunks = [
                file
                for array in ENCODINGS[dtype].arrays
                for file in store.path.glob(f"{split or '*'}/{array.folder}/{tap or '*'}/c.*")
            ]
            assert data.token_bytes(split, tap) == size_of(chunks) > 0
    assert data.stream_bytes("train", "block1") == sum(a.nbytes for a in store["train"].token_arrays("block1").values())
    assert data.stream_bytes("train", VIDEO) == store["train"].array("video").nbytes
    frames = [file for name in ("video", "segmentations", "ignored") for file in store.path.glob(f"*/{name}/c.*")]
    assert data.frame_bytes() > size_of(frames)
    assert data.frame_bytes() == 16 * SIZE * SIZE * 5


@pytest.mark.parametrize("dtype", ENCODINGS)
def test_a_source_is_planned_as_it_is_stored(tmp_path: Path, dtype: Dtype) -> None:
    lengths = {"train": (7, 3, 4), "validation": (2,)}
    store = make_store(tmp_path / "store.zarr", DiscSource(lengths), dtype=dtype)
    backbone = outline("resnet18", ("layer1",), SIZE)
    source: Source = DiscSource(lengths)
    planned = DataSet.of_source(source, backbone).stored_as(dtype)
    for name, split in planned.splits.items():
        for part in ("lengths", "chunk_frames", "frame_size", "masks", "ignored", "rows"):
            assert getattr(split, part) == getattr(store[name].spec, part)
    assert planned.spec.taps["layer1"] == TapSpec((SIZE // 4, SIZE // 4), 64)
    as_made = replace(planned, spec=replace(planned.spec, taps={"block1": TapSpec(GRID, DIM)}))
    assert as_made.token_bytes() == DataSet.of_store(store).token_bytes()


def test_a_rank_s_store_is_planned_as_its_share(tmp_path: Path, counted: None) -> None:
    source = DiscSource({"train": (7, 3, 4, 5), "validation": (2,)})
    whole = make_store(tmp_path / "store.zarr", source, chunk_frames=4)
    (path,) = export_for_ranks(whole.path, tmp_path / "parts", ConvertOptions(), 2, [1], 1)
    store, data = FeatureStore.open(path), DataSet.of_store(FeatureStore.open(path))
    files = [file for file in path.glob("*/features/*/c.*")]
    assert data.token_bytes() == size_of(files) < DataSet.of_store(whole).token_bytes()
    config = load_config("dinosaur", None, ["optim.batch_size=6", "data.residence=host"])
    stream = training_stream(config, store, Ranks(CPU, 1, 2))
    assert data.stream_bytes("train", "block1") == sum(r.rows.nbytes for r in stream._readers.values())  # type: ignore[attr-defined]
    plan = planned("dinosaur", data, CARD, "optim.batch_size=6", dtype="float16")
    own = store["train"].spec.own
    assert (plan.batch_size, plan.samples) == (3, sum(store["train"].spec.lengths[video] for video in own))
    assert "rank 1 of 2" in data.name


def test_processes_share_a_store_s_batches_and_its_epoch(shared_store: FeatureStore, counted: None) -> None:
    alone, shared = (
        planned("dinosaur", DataSet.of_store(shared_store, count), CARD, "optim.batch_size=6", dtype="float16")
        for count in (1, 2)
    )
    assert (shared.batch_size, shared.samples, shared.ring) == (3, alone.samples // 2, alone.ring // 2)
    assert shared.stream_bytes == alone.stream_bytes, "each reads of all videos"
    stream = training_stream(load_config("dinosaur", None, ["optim.batch_size=6"]), shared_store, Ranks(CPU, 1, 2))
    assert stream.batch_size == 3
    with pytest.raises(UsageError, match="6 has no 4 equal parts"):
        planned("dinosaur", DataSet.of_store(shared_store, 4), CARD, "optim.batch_size=6", dtype="float16")


def test_an_outline_is_planned_with_again() -> None:
    tower = outline("resnet18", ("layer1",), 32)
    first, second = (plan_extraction(tower, 10, CARD) for _ in range(2))
    assert first == second and first.cost.flops > 0


def test_an_outline_has_the_shapes_of_its_backbone() -> None:
    drawn, real = outline("resnet18", ("layer2",), 64), load_backbone("resnet18", "random", ("layer2",), 64)
    assert (drawn.taps, drawn.dims, drawn.grid) == (real.taps, real.dims, real.grid)
    with pytest.raises(UsageError, match="no multiple of the patch"):
        outline("dinov2", (), 225)


# -- memory ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_movi_a_on_a_card_of_32_gb() -> None:
    plan = make_plan(load_config("dinosaur"), movi_a(), CARD, ["float16", "int8"])
    float16, int8 = plan.training
    assert (float16.home.residence, int8.home.residence) == ("disk", "device")
    assert int8.stream_bytes == 9703 * 24 * 256 * (384 + 2)
    assert "(23.0 GB) on the device: 30.9 GB free" in int8.home.why
    first, second = plan.answer.removeprefix("MOVi-A on NVIDIA GeForce RTX 5090: ").split("; ")
    assert first.startswith("as float16 its features (45.8 GB) stay on the disk")
    assert second.startswith("as int8 its features (23.0 GB) fit on the device")
    assert second.endswith(f"batches of up to {int8.largest_batch} fit")
    assert int8.batch_size <= int8.largest_batch < float16.largest_batch


@given(
    fixed=st.integers(0, 1000), each=st.integers(1, 50), uneven=st.integers(0, 40), known=st.integers(1, 100),
    room=st.integers(0, 20_000), unit=st.sampled_from([8, 24]),
)  # fmt: skip
def test_the_largest_batch_fits_and_hardly_a_larger_one(
    fixed: int, each: int, uneven: int, known: int, room: int, unit: int
) -> None:
    """Of needs that grow as a line does, but for some batches."""

    def needs(batch: int) -> int:
        return fixed + each * batch + (uneven if batch // unit % 3 else 0)

    found = largest_batch(needs, known, room, unit)
    assert found % unit == 0 and (found == 0 or needs(found) <= room)
    assert uneven or needs(found + unit) > room


@pytest.mark.slow
def test_the_largest_batch_of_a_model_fits() -> None:
    small = ("optim.batch_size=8", *shortened("mix"))
    plan = planned("mix", movi_a(100), replace(CARD, free=Free(host=0, device=6 * 10**9)), *small)
    room = 6 * 10**9 - SPARE - plan.stream_bytes
    fits = []
    for batch in (plan.largest_batch, plan.largest_batch * 11 // 10):
        config = load_config("mix", None, [*small, f"optim.batch_size={batch}"])
        stored, decoded = movi_a().stored_as("int8").formats("train", "block12", (batch, 1))
        assert decoded is not None
        cost = count_step(config, ModelInput.of(config, movi_a().opened), decoded, on_gpu=True)
        fits.append(cost.peak + ring_bytes(stored, decoded) <= room)
    assert plan.home.residence == "device" and fits == [True, False]


def test_no_batch_fits_a_card_that_is_too_small(counted: None) -> None:
    card = replace(CARD, free=Free(host=0, device=SPARE + 10**6))
    plan = make_plan(load_config("image"), movi_a(10), card, ["int8"])
    assert plan.training[0].largest_batch == 0 and "no batch fits" in plan.answer


def test_the_plan_and_the_trainer_choose_alike(
    shared_store: FeatureStore, monkeypatch: pytest.MonkeyPatch, counted: None
) -> None:
    monkeypatch.setattr("featcache.stream.stream.open_readers", lambda *_: {})
    for preset in ("image", "dinosaur", "default", "pixel-small"):
        overrides = fitted(preset)
        config = load_config(preset, None, overrides)
        roomy = planned(preset, DataSet.of_store(shared_store), CARD, *overrides, dtype="float16")
        enough = roomy.stream_bytes + roomy.cost.peak + roomy.ring + SPARE
        for free, where in ((enough, "device"), (enough - 1, "host" if preset == "pixel-small" else "disk")):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
            monkeypatch.setattr("featcache.stream.residence.free_memory", lambda: 10**9)
            card = replace(CARD, free=Free(host=10**9, device=free))
            plan = planned(preset, DataSet.of_store(shared_store), card, *overrides, dtype="float16")
            assert plan.home == training_stream(config, shared_store, Ranks(CUDA)).home
            assert plan.home.residence == where


# -- time --------------------------------------------------------------------------------------------------

DEVICE = Device(
    "made", "made up", Free(0, 10**10), 1e9, {"float32": 1e12, "tf32": 2e12, "bfloat16": 4e12}, 1e8, "this test"
)


def test_a_bound_is_the_longest_of_three_operation_by_operation() -> None:
    work = {
        Work(10**12, 10**6, torch.float32): 2,  # 1 s of products, 1 ms of bytes
        Work(4 * 10**9, 10**9, torch.bfloat16): 3,  # 1 ms, 1 s
        Work(0, 10, None): 1000,  # 10 ns: a launch
    }
    bound = Bound.of(Cost(work, 0, 0, 0), DEVICE, "float32")
    assert bound.compute == pytest.approx(2.003)
    assert bound.memory == pytest.approx(3.002 + 1000 * 10 / 1e9)
    assert bound.launches == pytest.approx(1005 * LAUNCH)
    assert bound.together == pytest.approx(2 + 3 + 1000 * LAUNCH)
    assert bound.by == "memory" and bound.expected == pytest.approx(bound.together / UTILISATION)
    assert Bound.of(Cost(work, 0, 0, 0), DEVICE, "tf32").compute == pytest.approx(1.003)


def test_convolutions_have_a_rate_of_their_own_where_it_was_measured() -> None:
    work = {Work(10**12, 0, torch.float32, True): 1, Work(10**12, 0, torch.bfloat16, True): 1}
    cost = Cost(work, 0, 0, 0)
    assert Bound.of(cost, DEVICE, "float32").compute == pytest.approx(1 + 0.25)
    assert Bound.of(cost, replace(DEVICE, convolutions=2e12), "float32").compute == pytest.approx(0.5 + 0.25)
    config = load_config("log-2026", None, ["optim.batch_size=8"])
    batch = movi_a().stored_as("float16").formats("train", "block12", (8, 1))[0][0]
    step = count_step(config, ModelInput.of(config, movi_a().opened), batch, on_gpu=False)
    convolved = sum(work.flops * count for work, count in step.work.items() if work.convolution)
    assert 0.9 * step.flops < convolved < step.flops, "its decoder"


def test_the_largest_batch_is_looked_for_or_not(counted: None) -> None:
    plans = [make_plan(load_config("image"), movi_a(1), CARD, ["int8"], largest=wanted) for wanted in (True, False)]
    found, left = (plan.training[0] for plan in plans)
    assert found.largest_batch and left == replace(found, largest_batch=None)


def test_rates_follow_from_the_step(shared_store: FeatureStore, counted: None) -> None:
    """Of videos of 4, 4, 3, 4 and 2 frames."""
    overrides = (*fitted("savi-dinosaur"), "optim.steps=7200")
    plan = planned("savi-dinosaur", DataSet.of_store(shared_store), DEVICE, *overrides, dtype="float16")
    assert plan.samples == 3 + 3 + 2 + 3 + 1
    assert (plan.batch_size, plan.frames) == (2, 2)
    assert plan.seconds == max(plan.bound.expected, plan.data)
    assert plan.frames_per_s == pytest.approx(4 / plan.seconds)
    assert plan.hours == pytest.approx(2 * plan.seconds)
    assert plan.epoch_seconds == pytest.approx(6 * plan.seconds)


def test_what_arrives_too_slowly_binds(counted: None) -> None:
    link = replace(DEVICE, link=1e3)
    config = ("optim.batch_size=2",)
    batch = 2 * 256 * 386
    resident = planned("image", movi_a(1), link, *config)
    assert resident.home.residence == "device" and resident.data == 0 and resident.bound_by == resident.bound.by
    away = planned("image", movi_a(1), replace(link, free=Free(0, SPARE)), *config)
    assert away.home.residence == "disk" and away.data == pytest.approx(batch / 1e3) == away.seconds
    assert away.bound_by == "host link"
    slow = planned("image", movi_a(1), replace(link, link=1e12, free=Free(0, SPARE)), *config)
    assert slow.data_by == "disk"


@pytest.mark.slow
def test_extraction_is_the_backbone_s_products() -> None:
    """Against the products of ViT-S/14 at 224 px by hand: 257 tokens of width 384, 12 blocks."""
    length, width, patch = 257, 384, 14
    block = 2 * length * (4 * width**2 + 8 * width**2) + 2 * 2 * length**2 * width
    by_hand = 12 * block + 2 * 256 * (3 * patch**2) * width
    for precision, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        cost = count_pass(outline("dinov2"), 2, precision)  # type: ignore[arg-type]
        assert cost.flops == pytest.approx(2 * by_hand, rel=1e-6)
        assert {work.dtype for work in cost.work if work.flops} == {kind}


# -- devices -----------------------------------------------------------------------------------------------


def test_every_device_says_where_its_figures_are_from() -> None:
    for name, device in DEVICES.items():
        assert device.name == name and "https://" in device.source
        assert device.flops["float32"] <= device.flops["tf32"] <= device.flops["bfloat16"]
        assert find_device(name, "float32").free.device == device.free.device


def test_this_machine_is_measured() -> None:
    device = measured(CPU, "float32")
    assert device.flops["float32"] > 1e9 and device.bandwidth > 1e8 and (device.convolutions or 0) > 1e9
    assert device.free.device is None and not device.gpu and device.link is None
    assert device.source.startswith("measured here")


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_what_an_extraction_multiplies_is_measured_too(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with instructions for bfloat16, or a GPU that no data sheet is known of."""
    monkeypatch.setattr(devices, "fast_precision", lambda _: precision)
    monkeypatch.setattr(devices, "matmul_rate", lambda _, kind: lambda: {"bfloat16": 2e10}.get(kind, 1e10))
    halves = Cost({Work(2 * 10**10, 0, getattr(torch, precision)): 1}, peak=0, state=0, parameters=0)
    assert Bound.of(halves, measured(CPU, "float32"), "float32").compute == pytest.approx(1)


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_plans_a_store(shared_store: FeatureStore, slotlab: Slotlab, counted: None) -> None:
    sets = [part for override in fitted("default") for part in ("--set", override)]
    command = ("plan", "--cache", shared_store.path, "--device", "rtx5090", *sets)
    said = slotlab(*command, "--json").json
    (form,) = said["training"]
    assert said["device"]["name"] == "rtx5090" and "https://" in said["device"]["source"]
    assert form["home"]["residence"] == "device" and form["batch_size"] == 2
    inputs = ModelInput.of(load_config(), shared_store)
    assert form["stream_bytes"] == sum(a.nbytes for a in shared_store["train"].token_arrays(inputs.tap).values())
    assert said["answer"].endswith(f"batches of up to {form['largest_batch']} fit")
    assert math.isclose(form["frames_per_s"], 2 * 2 / form["seconds"])
    shown = " ".join(slotlab(*command).out.split())
    assert said["answer"] in shown and "https://" in shown and "bound by" in shown


def test_the_command_plans_what_is_not_there(slotlab: Slotlab, counted: None) -> None:
    what = ("--videos", 50, "--frames", 24, "--backbone", "resnet18", "--input-size", 64)
    said = slotlab("plan", *what, "--preset", "image", "--device", "h100", "--batch-size", 4, "--json").json
    assert [form["dtype"] for form in said["training"]] == list(ENCODINGS)
    assert said["training"][0]["token_bytes"] == 50 * 24 * 16 * 256 * 2
    assert said["frame_bytes_at_most"] == 50 * 24 * 256 * 256 * 5
    assert said["extraction"]["backbone"] == "resnet18" and said["extraction"]["frames"] == 1200


def test_train_plans_instead(shared_store: FeatureStore, slotlab: Slotlab, tmp_path: Path, counted: None) -> None:
    sets = [part for override in fitted("default") for part in ("--set", override)]
    ended = slotlab("train", "--cache", shared_store.path, *sets, "--device", "cpu", "--out", "run", "--plan")
    assert ended.code == 0 and "largest batch" in ended.out and not (tmp_path / "run").exists()


def test_torchrun_plans_a_rank_s_share_once(
    shared_store: FeatureStore, slotlab: Slotlab, counted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [part for override in fitted("default") for part in ("--set", override)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        said.append(slotlab("train", "--cache", shared_store.path, *sets, "--device", "cpu", "--plan").out)
    assert "batch 1" in said[0] and "one of 2 processes" in " ".join(said[0].split()) and said[1] == ""


def test_a_world_model_is_planned_before_there_is_a_run(slotlab: Slotlab, tmp_path: Path, counted: None) -> None:
    """On tracks that are, but for their values, those of a run with so many slots."""
    tracks = tracks_of(tracked(tmp_path))
    features = DataSet.of_store(FeatureStore.open(tmp_path / "synthetic.zarr"))
    as_planned, real = features.tracked(tracks.spec.taps[TRACKS].patches), DataSet.of_store(tracks)
    assert as_planned.token_bytes() == real.token_bytes(tap=TRACKS) > 0
    assert ModelInput.of(load_config("dynamics"), as_planned.opened) == ModelInput.of(load_config("dynamics"), tracks)
    what = ("--videos", 9, "--backbone", "resnet18", "--input-size", 64, "--device", "rtx5090")
    said = slotlab("plan", *what, "--preset", "dynamics", "--slots", 5, "--batch-size", 2, "--json").json
    (form,) = said["training"]
    assert form["dtype"] == "float16" and form["stream_bytes"] == 9 * 24 * 5 * (256 + 16 + 2) * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--videos", "1", "--device", "rtx6000"), f"choose one of {', '.join((*HERE, *DEVICES))}"),
        ((), "name the data by one of --cache STORE, --data SOURCE and --videos N"),
        (("--videos", "1", "--cache", "x.zarr"), "name the data by one of"),
        (("--cache", "none.zarr", "--device", "h100"), "none.zarr: no such store"),
        (("--videos", "1", "--preset", "best"), "--preset best: unknown"),
    ],
)
def test_mistakes_are_one_line(slotlab: Slotlab, args: tuple[str, ...], message: str) -> None:
    ended = slotlab("plan", *args)
    assert ended.code in (2, 3) and ended.out == ""
    assert message in " ".join(ended.said.split())
