"""Configuration: precedence, round trip, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from featcache.errors import DataError, UsageError
from slotlab.config.load import load_config, presets, read_toml, validate, walk
from slotlab.config.model import MODEL_KINDS, ClusteringConfig, Logistic, Sign
from slotlab.config.schema import LOSS_NAMES, NORMALISATIONS, Config
from slotlab.imported.importing import SOURCES
from slotlab.masks.refine import METHODS
from slotlab.models import flow
from slotlab.models.build import MODELS
from slotlab.models.clustering import tracking
from slotlab.models.decoders import DECODERS
from slotlab.models.dynamics.blocks import BLOCKS
from slotlab.models.initializers import INITIALIZERS
from slotlab.models.normalise import RECIPES
from slotlab.models.predictors import PREDICTORS
from slotlab.scoring.collapse import COLLAPSES
from slotlab.training import losses
from slotlab.words import ModelSource, Refinement


def test_command_line_over_file_over_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 5\n[model]\nslots = 6\n[optim]\nsteps = 7\n")
    config = load_config("default", file, ["model.slots=9", "data.normalize=channel"], optim__batch_size=3, seed=None)
    preset = load_config("default")
    assert (config.seed, config.model.slots, config.optim.steps, config.optim.batch_size) == (5, 9, 7, 3)
    assert config.data.normalize == "channel"
    assert config.model.slot_dim == preset.model.slot_dim


@pytest.mark.parametrize("preset", presets())
def test_presets_survive_the_round_trip(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert validate(read_toml(file), str(file)) == config


@pytest.mark.parametrize("preset", presets())
def test_presets_set_nothing_without_effect(preset: str) -> None:
    assert load_config(preset).unread() == []


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        (
            "mix",
            ["model.decoder.masks=gumbel"],
            "model.decoder.masks = gumbel has no effect with model.decoder.kind = mix",
        ),
        ("dinosaur-ar", ["model.decoder.patches=9"], "model.decoder.patches = 9 has no effect with"),
        ("dinosaur", ["data.center=position", "data.normalize=sample"], "data.center = position has no effect with"),
        ("default", ["model.tracking=false", "model.merge_distance=0.2"], "model.merge_distance = 0.2 has no effect"),
        ("default", ["data.normalize=whiten=8", "data.shrinkage=0.2"], "data.shrinkage = 0.2 has no effect with"),
        ("default", ["optim.half_life=9"], "optim.half_life = 9 has no effect with optim.decay = cosine"),
        (
            "savi-dinosaur",
            ["model.predictor.kind=mlp", "model.predictor.heads=2"],
            "model.predictor.heads = 2 has no effect",
        ),
        ("dinosaur", ["model.decoder.masks=gumbel", "data.center=position", "data.normalize=whiten=8"], None),
    ],
)
def test_what_has_no_effect_is_told(preset: str, overrides: list[str], told: str | None) -> None:
    unread = load_config(preset, None, overrides).unread()
    assert unread == [] if told is None else told in unread[0] and len(unread) == 1


REGISTRIES: dict[str, Any] = {
    "model.initializer": INITIALIZERS,
    "model.predictor.kind": PREDICTORS,
    "model.decoder.kind": DECODERS,
    "model.attention": BLOCKS,
}
SWITCHES = {  # words that choose between a few lines, which stand together
    *("data.center", "data.residence", "model.projection", "model.gradient", "model.gru_hidden"),
    *("model.decoder.source", "model.decoder.scans"),
    *("model.decoder.masks", "optim.scaling", "optim.decay", "optim.precision", "published_masks"),
}


def test_every_word_of_the_configuration_has_its_part() -> None:
    """And every part its word."""
    assert set(MODEL_KINDS) == set(MODELS)
    assert set(LOSS_NAMES) == set(losses.LOSSES)
    assert set(NORMALISATIONS) == set(RECIPES)
    assert set(get_args(Sign)) == set(COLLAPSES)
    assert set(get_args(Refinement)) == set(METHODS)
    assert set(get_args(ModelSource)) == set(SOURCES)
    found: dict[str, set[str]] = {}
    for kind in MODEL_KINDS:
        for key in walk(kind):
            words = get_args(key.field.annotation)
            if get_origin(key.field.annotation) is Literal and len(words) > 1:
                found.setdefault(key.path, set()).update(words)  # a kind of model may allow fewer
    assert set(found) == set(REGISTRIES) | SWITCHES
    for path, registry in REGISTRIES.items():
        assert found[path] == set(registry), path


OLD = {  # what runs of the first version name beside the settings of today, and what they have
    **{"seed_objectness": 0.6, "tracking_iterations": 2, "least_mass": 1.0, "flow_radius": 0.34},
    **{"flow_temperature": 0.1, "prior_floor": 0.05, "lasting_frames": 8, "lasting_threshold": 0.8},
}


def test_settings_that_became_constants_are_read_where_they_say_the_same() -> None:
    plain = load_config("default")
    assert validate({**plain.model_dump(), "model": {**plain.model.model_dump(), **OLD}}, "old") == plain
    assert load_config("image", None, ["model.lasting_threshold=0"]) == load_config("image")
    assert load_config("objects", None, ["model.share_weight=0.5"]) == load_config("objects")
    assert load_config("objects", None, ["model.train_temperature=0.1"]) == load_config("objects")
    for name, value in OLD.items():
        constant = {"tracking_iterations": "iterations"}.get(name, name).upper()
        owner = flow if name.startswith(("flow", "prior")) else tracking
        assert getattr(owner, constant, value) == value
        assert hasattr(owner, constant) or name.startswith("lasting")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("flow_radius=0.5", r"^--set: model\.flow_radius: is fixed at 0\.34 now; leave it out$"),
        ("lasting_threshold=0.88", r"^--set: model\.lasting_threshold: is gone: .*; leave it out$"),
    ],
)
def test_settings_that_became_constants_cannot_be_changed(override: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        load_config("default", None, [f"model.{override}"])
    with pytest.raises(UsageError, match="no such key"):
        load_config("dinosaur", None, [f"model.{override}"])


def test_one_number_of_a_pair_can_be_set_alone() -> None:
    model = load_config("default", None, ["model.target_objectness.threshold=0.9"]).model
    assert isinstance(model, ClusteringConfig)
    assert model.target_objectness == Logistic(threshold=0.9, width=0.125)


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.slot=7", "model.slot: no such key; did you mean model.slots"),
        ("model.slots=0", "model.slots: Input should be greater than or equal to 2"),
        ("model.decoder=cnn", "model.decoder: no such key"),  # not one of this kind of model
        ("model.kind=slot_attention", "data.clip above 1 needs a video model"),
        ("model.kind=perceiver", "model: Input tag 'perceiver'"),
        ("loss.temporal_similarity=0.1", "loss.temporal_similarity needs model.kind = slot_attention"),
        ("loss.slot_contrast=0.5", "loss.slot_contrast needs slots carried over clips"),
        ("loss.feature_mse=0", "no loss is on"),
        ("model.slots=257", "model.slots: Input should be less than or equal to 256"),  # a label is a byte
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed=99999999999999999999999", "seed: Input should be less than"),
        ("model.initializer=kmeans", "model.initializer: no such key$"),  # of another kind of model
        ("model.position=1", "did you mean model.position_weight"),
        ("optim.cuda_graphs=true", "optim.cuda_graphs needs optim.compile=true"),
        ("data.tap=video", "model.kind = pixel needs data.tap = video"),
        ("model.slots", "write it as key=value"),
        ("model=clustering", "model: Input should be a valid dictionary"),
        ("modle.slots=7", "modle: no such key; did you mean model"),
        ("optim.lr=1", "optim.lr: no such key$"),
        ("data.normalize=slw=3", "data.normalize: normalisation 'slw=3' is not known; choose one of"),
    ],
)
def test_wrong_overrides_name_the_key(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config("default", None, [override])


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("slotcontrast", ["optim.accumulate=2"], "loss.slot_contrast needs optim.accumulate=1"),
        ("pixel", ["model.gradient=implicit", "model.initializer=learnt"], "implicit never reaches learnt slots"),
        ("pixel", ["model.slots=1"], "model.slots: Input should be greater than or equal to 2"),
        ("dinosaur", ["model.slots=1"], "model.slots: Input should be greater than or equal to 2"),
        (
            "default",
            ["optim.compile=true", "optim.cuda_graphs=true", "optim.accumulate=2"],
            "optim.cuda_graphs needs optim.accumulate=1",
        ),
        ("videosaur", ["model.predictor.refresh=1"], "refresh = 1 starts every frame afresh"),
        ("dinosaur", ["model.decoder.masks=gumbel", "loss.diversity=0.1"], "need model.decoder.masks = soft"),
        ("dinosaur", ["model.projection_hidden=0"], "projection_hidden: Input should be greater than"),
        ("pixel", ["model.slot_mlp_hidden=-3"], "slot_mlp_hidden: Input should be greater than"),
    ],
)
def test_parts_that_do_not_go_together(preset: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config(preset, None, overrides)


def test_what_is_wrong_is_looked_for_where_it_was_given(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("optim.learning_rat = 1e-3")
    with pytest.raises(UsageError, match=r"wrong\.toml: optim\.learning_rat: .* did you mean optim\.learning_rate"):
        load_config("default", file, ["model.slots=7"], optim__steps=3)
    with pytest.raises(UsageError, match="^--set: optim.learning_rate"):
        load_config("default", None, ["optim.learning_rate=nan"], optim__steps=3)


def test_wrong_files_and_presets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_config("default", tmp_path)
    (tmp_path / "picture.toml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UsageError, match=r"picture\.toml: not TOML"):
        load_config("default", tmp_path / "picture.toml")
    with pytest.raises(UsageError, match="--preset best: unknown; there are: .*default"):
        load_config("best")
    with pytest.raises(DataError, match="no such file"):
        load_config("default", tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("seed = = 1")
    with pytest.raises(UsageError, match="not TOML"):
        load_config("default", tmp_path / "bad.toml")
