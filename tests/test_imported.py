"""Published checkpoints as runs: what the models compute, what is refused, and what such a run can do."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.errors import IncompatibleError, UsageError
from featcache.store.reading import FeatureStore
from slotlab.config.load import load_config
from slotlab.imported.importing import SOURCES, configuration, import_run
from slotlab.imported.published import read_published
from slotlab.imported.source import translate
from slotlab.imported.vits import backbone_of
from slotlab.models.build import empty_model
from slotlab.models.initializers import INITIALIZERS
from slotlab.models.inputs import Features
from slotlab.models.randomness import Draws
from slotlab.models.slot_model import SlotModel
from slotlab.report.gather import gather
from slotlab.report.provenance import provenance
from slotlab.runs import checkpoint
from slotlab.runs.folder import check_store, trained_on, trained_spec
from slotlab.runs.loaded import load_run
from slotlab.training.train import train
from tests.commands import Slotlab
from tests.published_models import HEADS, K, S, Sums, martius, oclf, spot, tensors
from tests.synthetic import DIM, GRID, DiscSource, make_store

N = GRID[0] * GRID[1]
SLOTS = f"model.slots={K}"


def saved(path: Path, of: dict[str, Tensor], **beside: Any) -> Path:
    torch.save({"state_dict": of, **beside}, path)
    return path


def model_of(path: Path, source: str, *overrides: str) -> SlotModel:
    """The model of a checkpoint of tokens that no backbone gives."""
    table = SOURCES[source]
    published = read_published(path, table.spelling)
    derived = table.derive(published)
    config = configuration(published, derived, overrides)
    model = empty_model(config, Features("", GRID, derived.dim))
    translate(table, published, derived, config, model)
    assert isinstance(model, SlotModel)
    return model.eval()


CASES = {
    "videosaur, similarities": ("videosaur", {"video": True, "mixer": True, "learnt": False, "outputs": N}),
    "videosaur, both": ("videosaur", {"video": True, "mixer": True, "learnt": True, "outputs": DIM + N}),
    "videosaur, images": ("videosaur", {"video": False, "mixer": False, "learnt": False}),
    "slotcontrast": ("slotcontrast", {"video": True, "mixer": False, "learnt": True}),
    "oclf": ("oclf", {}),
    "spot": ("spot", {"learnt": False, "orders": 9}),
    "spot, learnt slots, rows": ("spot", {"learnt": True, "orders": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_computes_what_the_published_one_does(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = CASES[case]
    shapes = {"oclf": oclf, "spot": spot}.get(source, martius)
    of = tensors(shapes(DIM, N, **options))  # type: ignore[operator]
    generator = torch.Generator().manual_seed(1)
    frames, first = torch.randn(3, N, DIM, generator=generator), torch.randn(K, S, generator=generator)
    learnt = of.get("initializer.slots", of.get("slot_attn.slots_init.weight"))
    heads = [f"model.decoder.heads={HEADS}"] if source == "spot" else []
    model = model_of(saved(tmp_path / "a.ckpt", of), source, *([SLOTS] if learnt is None else []), *heads)
    if learnt is not None:
        first = learnt.view(K, S)
    else:
        monkeypatch.setattr(INITIALIZERS["gaussian"], "forward", lambda *_: first.expand(3, K, S))
        if model.recur.predict is not None:
            monkeypatch.setattr(INITIALIZERS["gaussian"], "forward", lambda *_: first.expand(1, K, S))
    with torch.no_grad():
        ours = model.segment(frames, Draws(0))
    sums = Sums(of)
    kinds = {name: options[name] for name in ("video", "mixer", "orders") if name in options}
    theirs = {"oclf": sums.oclf, "spot": sums.spot}.get(source, sums.martius)(frames, first, **kinds)
    slots, attention, masks, decoded = (torch.stack(parts) for parts in zip(*theirs, strict=True))
    told = {"slots": slots, "attention": attention, "masks": masks}
    for name, value in told.items():
        torch.testing.assert_close(getattr(ours, name), value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    reconstruction = decoded[..., :DIM] if decoded.shape[-1] != N else None
    if reconstruction is not None:
        torch.testing.assert_close(ours.reconstruction, reconstruction, rtol=1e-4, atol=1e-4)
    else:
        assert not bool(ours.reconstruction.any())
    if decoded.shape[-1] > DIM:
        torch.testing.assert_close(ours.similarity, decoded[..., -N:], rtol=1e-4, atol=1e-4)


def test_gaussian_slots_are_drawn_from_the_published_distribution(tmp_path: Path) -> None:
    of = tensors(oclf(DIM, N))
    model = model_of(saved(tmp_path / "a.ckpt", of), "oclf", "model.slots=200")
    drawn = model.recur.initialize(torch.zeros(50, N, S), torch.zeros(50, N, DIM), Draws(0)).flatten(0, 1)
    mean, spread = (of[f"models.conditioning.slots_{name}"][0, 0] for name in ("mu", "logsigma"))
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.std(0).log(), spread, rtol=0, atol=0.1)


VIT, SIDE = "dinov2_vits14", 56  # a grid of 4 x 4


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return martius(384, N, video=True, mixer=False, learnt=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of SlotContrast's on four by four tokens of DINOv2 ViT-S/14."""
    folder = tmp_path_factory.mktemp("published")
    return saved(folder / "model.ckpt", tensors(shapes), global_step=7, epoch=1)


@pytest.fixture(scope="module")
def imported(file: Path) -> Path:
    """Its run, which the tests only read."""
    return import_run(file, "slotcontrast", file.with_name("run"), backbone=VIT).run


@pytest.fixture(scope="module")
def wanted(imported: Path) -> FeatureStore:
    """A store of what it was trained on."""
    return make_store(imported.with_name("wanted.zarr"), like=trained_spec(imported))


def test_an_imported_run_says_where_it_is_from_and_what_it_assumes(
    file: Path, tmp_path: Path, slotlab: Slotlab
) -> None:
    command = ("import-run", file, "--from", "slotcontrast", "--backbone", VIT, "--set", "model.iterations=4")
    told = slotlab(*command, "--out", "runs/a", "--json").json
    assert told["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (told["source"], told["checkpoint"], told["step"]) == ("slotcontrast", str(file), 7)
    assert told["assumed"] == {"data.tap": "block12", "model.predictor.first_iterations": 3, "model.predictor.heads": 4}
    assert f"--backbone {VIT} --data VIDEOS --input-size {SIDE}x{SIDE}" in told["extract"]
    run = tmp_path / "runs/a"
    config = checkpoint.load_run_config(run)
    assert config.model.slots == K and config.optim.steps == 7
    assert config.model_dump()["model"]["iterations"] == 4 and config.data.normalize == "none"
    assert trained_on(run)["imported"] == {key: told[key] for key in trained_on(run)["imported"]}
    again = slotlab(*command, "--out", "runs/a")
    assert again.code == 2 and "exists already; choose another --out" in again.said


def test_an_imported_run_is_used_on_a_store(imported: Path, wanted: FeatureStore) -> None:
    loaded = load_run(imported, wanted.path)
    with torch.no_grad():
        theirs = Sums(torch.load(imported.with_name("model.ckpt"))["state_dict"]).martius(
            loaded.inputs.read(loaded.split(), 0).float(), loaded.model.recur.initialize.queries[0],  # type: ignore[union-attr, index]
            video=True, mixer=False,
        )  # fmt: skip
    torch.testing.assert_close(loaded.segment(loaded.split(), 0).masks, torch.stack([t[2] for t in theirs]))


def test_another_store_says_which_extraction_it_wants(
    imported: Path, shared_store: FeatureStore, slotlab: Slotlab
) -> None:
    ended = slotlab("eval", imported, "--cache", shared_store.path)
    assert ended.code == 4
    command = shlex.split(ended.said.partition("make what it wants with: ")[2].partition("; then")[0])
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert command[:2] == ["slotlab", "extract"]
    assert options | {"--out": ""} == {
        **{"--backbone": VIT, "--tap": "block12", "--input-size": "56x56", "--frame-size": "32x32"},
        **{"--data": "VIDEOS", "--out": ""},  # the store records no source
    }
    assert f"then add --cache {options['--out']}" in ended.said
    alone = slotlab("eval", imported)
    assert alone.code == 3 and "imported without a store; make one with: slotlab extract" in alone.said


@pytest.mark.parametrize(("tag", "fits"), [("random", False), ("file:mine.pth", True)])
def test_a_backbone_without_training_is_not_the_one_it_wants(
    tag: str, fits: bool, imported: Path, tmp_path: Path
) -> None:
    spec = trained_spec(imported)
    like = replace(spec, model={**spec.model, "weights_tag": tag, "weights_sha256": "0"})
    store = make_store(tmp_path / "store.zarr", DiscSource({"validation": (1,)}), like=like)
    with nullcontext() if fits else pytest.raises(IncompatibleError, match="weights_tag: store 'random', asked 'lvd"):
        check_store(imported, store)


def test_a_store_is_bound_if_it_fits(
    file: Path, wanted: FeatureStore, shared_store: FeatureStore, slotlab: Slotlab, tmp_path: Path
) -> None:
    command = ("import-run", file, "--from", "slotcontrast", "--backbone", VIT)
    assert slotlab(*command, "--out", "one", "--cache", shared_store.path).code == 4
    assert not (tmp_path / "one").exists()
    assert slotlab(*command, "--out", "two", "--cache", wanted.path).code == 0
    assert load_run(tmp_path / "two").store.path == wanted.path


def test_nothing_resumes_but_training_goes_on_from_the_weights(
    imported: Path, wanted: FeatureStore, slotlab: Slotlab, tmp_path: Path
) -> None:
    ended = slotlab("train", "--cache", wanted.path, "--out", imported, "--resume")
    assert ended.code == 2 and "was imported, with weights and no state of an optimiser" in ended.said
    small = ["optim.steps=1", "optim.batch_size=2", "data.clip=2", "optim.learning_rate=1e-9"]
    config = load_config("slotcontrast", imported / checkpoint.CONFIG, small)
    train(config, wanted, tmp_path / "on", init_from=imported)
    before, after = (load_run(run, wanted.path).model.state_dict() for run in (imported, tmp_path / "on"))
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def test_a_report_says_that_a_run_was_imported(imported: Path, file: Path, wanted: FeatureStore) -> None:
    (run,) = gather([imported], cache=wanted.path).runs
    found = provenance(run)
    assert run.evaluation is not None and run.evaluation.step == 7 and run.finished
    facts = dict(found.facts)
    assert facts["imported from"] == f"{file} (martius-lab/slotcontrast 17b42b0), at step 7"
    assert "trained on" not in facts and "checkpoint" not in facts
    again = next(source.command for source in found.sources if source.numbers == "weights")
    assert again.startswith(f"slotlab import-run {file} --from slotcontrast --backbone {VIT} --input-size 56x56 --out")


@pytest.mark.slow
def test_pictures_are_segmented_without_a_store(imported: Path) -> None:
    import slotlab

    found = slotlab.load(imported, weights="random").segment(np.zeros((32, 32, 3), np.uint8))
    assert found.masks.shape == (1, K, 32, 32)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda of: of.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda of: of.__setitem__(name, torch.zeros(shape))


GRU, QUERY = "processor.module.corrector.gru.weight_ih", "processor.module.corrector.to_q.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(GRU), r"has no processor\.corrector\.gru\.weight_ih; it is not whole"),
        (without("decoder.module.pos_emb"), r"has no decoder\.pos_emb; is it a checkpoint of another source"),
        (without("decoder.module.mlp.layers.2.bias"), r"has no decoder\.mlp\.layers\.2\.bias; it is not whole"),
        (put("decoder.module.gate.weight", 3), r"decoder\.module\.gate\.weight: no tensor of slotcontrast's models"),
        (put(QUERY, S, S + 1), r"module\.corrector\.to_q\.weight has shape \(8, 9\), and \(8, 8\) would fit"),
        (put("decoder.module.mlp.layers.4.weight", 99, 16), r"its decoder gives 98 values a patch, and not 384 \(tok"),
        (put("processor.module.predictor.blocks.1.norm1.weight", S), r"a predictor of 2 blocks, and ours has one"),
    ],
)
def test_a_tensor_that_is_missing_unknown_or_unfit_is_named(
    change: Callable[[dict[str, Tensor]], None],
    said: str,
    shapes: dict[str, tuple[int, ...]],
    slotlab: Slotlab,
    tmp_path: Path,
) -> None:
    of = tensors(shapes)
    change(of)
    ended = slotlab(
        "import-run", saved(tmp_path / "bad.ckpt", of), "--from", "slotcontrast", "--backbone", VIT, "--out", "bad"
    )
    assert ended.code == 4 and ended.said.count("\n") == 1
    assert re.search(said, ended.said), ended.said
    assert not (tmp_path / "bad").exists()


def test_a_teacher_of_spot_reads_one_vit_though_its_file_has_it_twice(tmp_path: Path, slotlab: Slotlab) -> None:
    of = tensors(spot(384, N, learnt=True, orders=9))
    vit = {f"{start}.blocks.8.attn.qkv.weight": torch.ones(2) for start in ("encoder", "second_encoder")}
    command = ("import-run", "spot.ckpt", "--from", "spot", "--backbone", VIT, "--json")
    torch.save({"model": of | vit, "epoch": 3}, tmp_path / "spot.ckpt")
    told = slotlab(*command).json
    assert told["assumed"]["model.decoder.scans"] == "all" and told["assumed"]["model.decoder.heads"] == 6
    assert told["tap"] == "block12" and "--weights" not in told["extract"]
    named = slotlab(*command, "--set", "data.tap=encoder.block12", "--out", "own").json["extract"]
    assert "--tap encoder.block12 " in named and f"--weights {tmp_path / 'spot.ckpt'}" in named
    torch.save({"model": of | {"mask_token": torch.zeros(1)}}, tmp_path / "spot.ckpt")
    assert "mask_token: no tensor of spot's models" in slotlab(*command, "--out", "other").said
    fewer = {name: value for name, value in of.items() if not name.startswith("dec.blocks")}
    torch.save({"model": fewer}, tmp_path / "spot.ckpt")
    assert "its decoder is no transformer" in slotlab(*command, "--out", "other").said


class Dangerous:
    """Makes a folder when it is loaded as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, slotlab: Slotlab) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Dangerous(tmp_path / "made")}, path)
    ended = slotlab("import-run", path, "--from", "oclf", "--out", "run")
    assert ended.code == 3 and not (tmp_path / "made").exists()
    assert "holds code beside its tensors (posix.mkdir), " in ended.said and "which is not run" in ended.said
    command = shlex.split(ended.said.partition("python -c ")[2])[0]
    exec(command)  # what the user is told to do, where he trusts the file
    assert torch.load(tmp_path / "model.tensors.ckpt") == {"state_dict": {}}


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_checkpoint_is_one_line(content: bytes, tmp_path: Path, slotlab: Slotlab) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    ended = slotlab("import-run", "a.ckpt", "--from", "videosaur", "--out", "run")
    assert ended.code == 3 and "not a checkpoint of tensors, or damaged" in ended.said
    assert slotlab("import-run", "b.ckpt", "--from", "videosaur", "--out", "run").code == 3


def test_what_no_shape_tells_is_asked_for(tmp_path: Path, slotlab: Slotlab) -> None:
    path = saved(tmp_path / "a.ckpt", tensors(oclf(384, N)))
    told = "does not tell model.slots (published: 11 for MOVi-C, 24 for MOVi-E, 7 for COCO, 6 for VOC)"
    assert told in slotlab("import-run", path, "--from", "oclf", "--out", "run").said
    unknown = slotlab("import-run", path, "--from", "oclf", "--set", SLOTS, "--out", "run")
    assert unknown.code == 2 and "on which backbone it was trained with --backbone NAME" in unknown.said
    wide = slotlab("import-run", path, "--from", "oclf", "--set", SLOTS, "--backbone", "dinov2_vitb14", "--out", "run")
    assert wide.code == 4 and "16 tokens of 384 channels, and dinov2_vitb14 gives 16 of 768" in wide.said
    with pytest.raises(UsageError, match="--from slate: unknown; there are: videosaur, slotcontrast, spot, oclf"):
        import_run(path, "slate", tmp_path / "run")


@pytest.mark.parametrize(
    ("patch", "width", "more", "name"),
    [
        (14, 384, ("blocks.0.ls1.gamma",), "dinov2_vits14"),
        (14, 768, ("blocks.0.ls1.gamma",), "dinov2_vitb14"),
        (14, 384, ("blocks.0.ls1.gamma", "reg_token"), "dinov2_vits14_reg"),
        (16, 768, (), "dino_vitb16"),
        (8, 384, (), "timm:vit_small_patch8_224.dino"),
        (32, 384, (), None),
    ],
)
def test_the_vit_in_a_checkpoint_names_the_backbone(
    patch: int, width: int, more: tuple[str, ...], name: str | None, tmp_path: Path
) -> None:
    of = {
        "vit.patch_embed.proj.weight": torch.zeros(width, 3, patch, patch),
        **{f"vit.{m}": torch.zeros(1) for m in more},
    }
    assert backbone_of(read_published(saved(tmp_path / "a.ckpt", of), str), "vit.") == name
