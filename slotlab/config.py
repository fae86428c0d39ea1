"""One frozen, validated configuration for a run.

Precedence: command line (``--set model.slots=7`` and the shorthands) over ``--config FILE.toml`` over the
preset. A run folder's ``config.toml`` is this object written out, and reads back to an equal one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from featcache.errors import DataError, UsageError


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Section):
    """What is read, and how it is scaled."""

    tap: str | None = None  # None: the store's first
    train_split: str = "train"
    eval_split: str = "validation"
    normalize: str = "whiten"  # whiten | slow=K | channel | scale | none | sample | fixed=FACTOR
    center: Literal["channel", "position"] = "channel"  # the mean that normalisation subtracts
    shrinkage: float = Field(0.1, ge=0, le=1)
    residence: Literal["auto", "disk", "host", "device"] = "auto"
    clip: int = Field(1, ge=1)  # consecutive frames a sample; more than one needs a model that is trained across time


class SlotAttentionConfig(_Section):
    """DINOSAUR's image model: its parts and their sizes (slotlab.models.slot_model)."""

    kind: Literal["slot_attention"] = "slot_attention"
    slots: int = Field(11, ge=1)
    slot_dim: int = Field(128, ge=1)
    projection: Literal["mlp", "linear"] = "mlp"
    projection_hidden: int | None = None  # None: the features' width
    initializer: Literal["gaussian", "gaussian_per_slot", "learnt", "kmeans++", "kmeans"] = "kmeans"
    kmeans_rounds: int = Field(8, ge=0)
    iterations: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)
    slot_mlp_hidden: int = 512
    decoder: Literal["mlp", "mix"] = "mix"
    decoder_hidden: int = Field(256, ge=1)
    decoder_layers: int = Field(2, ge=1)  # hidden layers


class Logistic(_Section):
    """``sigmoid((norm / (threshold * otsu) - 1) / width)`` of a token's norm, otsu being Otsu's threshold."""

    threshold: float = Field(gt=0)
    width: float = Field(gt=0)


class ClusteringConfig(_Section):
    """Soft clusters of learnt keys, trained across time (slotlab.models.clustering_model)."""

    kind: Literal["clustering"] = "clustering"
    slots: int = Field(13, ge=2)  # the background's included; a frame uses as many as it needs
    slot_dim: int = Field(64, ge=1)
    hidden: int = Field(256, ge=1)
    iterations: int = Field(5, ge=1)
    temperature: float = Field(0.05, gt=0)
    position_weight: float = Field(1.0, ge=0)
    new_slot_distance: float = Field(0.6, gt=0)  # squared, between unit keys with position
    objectness: Logistic = Logistic(threshold=1.0, width=0.25)  # that the model starts from
    target_objectness: Logistic = Logistic(threshold=1.1, width=0.125)  # tighter, or the masks swell
    seed_objectness: float = Field(0.6, gt=0, lt=1)  # a token below it starts no slot


class OptimConfig(_Section):
    """Adam, linear warm-up, cosine decay, clipping."""

    steps: int = Field(800, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    final_learning_rate: float = Field(0.0, ge=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False


MODEL_KINDS = ("slot_attention", "clustering")


class Config(_Section):
    """Everything that decides a run's result, besides the store itself."""

    seed: int = 0
    data: DataConfig = DataConfig()
    model: SlotAttentionConfig | ClusteringConfig = Field(SlotAttentionConfig(), discriminator="kind")
    optim: OptimConfig = OptimConfig()
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(200, ge=1)

    @model_validator(mode="after")
    def _clips_need_a_model_for_them(self) -> Self:
        if self.data.clip > 1 and self.model.kind != "clustering":
            raise ValueError("data.clip above 1 needs model.kind = clustering")
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def presets() -> tuple[str, ...]:
    """Names of the shipped presets."""
    folder = resources.files("slotlab") / "presets"
    return tuple(sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml")))


def load_config(
    preset: str = "default", file: Path | None = None, overrides: Iterable[str] = (), **shorthands: Any
) -> Config:
    """Merge preset, file and overrides (``section.key=value``, value as TOML or bare text) into a ``Config``.

    ``shorthands`` are overrides with ``__`` for the dot; a ``None`` is left out. Raises ``UsageError`` naming
    the key that is unknown or invalid.
    """
    if preset not in presets():
        raise UsageError(f"--preset {preset}: unknown; there are: {', '.join(presets())}")
    text = (resources.files("slotlab") / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    values = tomllib.loads(text)
    where = f"preset {preset}"
    if file is not None:
        where = str(file)
        _merge(values, read_toml(file))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: write it as key=value, for example --set model.slots=7")
        where = "--set"
        _merge(values, _nested(key.strip(), _value(value.strip())))
    for key, value in shorthands.items():
        if value is not None:
            _merge(values, _nested(key.replace("__", "."), value))
    return validate(values, where)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; name a TOML configuration") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML ({error})") from error


def validate(values: Mapping[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # The tag of the model's kind, which pydantic puts into the path, is not part of the key.
        key = ".".join(str(part) for part in first["loc"] if part not in MODEL_KINDS)
        hint = ""
        if first["type"] == "extra_forbidden" and (close := get_close_matches(key, _keys(Config), n=1, cutoff=0.5)):
            hint = f"; did you mean {close[0]}?"
        message = "no such key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UsageError(": ".join(part for part in (where, key, message + hint) if part)) from error


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, item in model.model_fields.items():
        parts = [part for part in (item.annotation, *get_args(item.annotation)) if isinstance(part, type)]
        nested = [part for part in parts if issubclass(part, BaseModel)]
        keys += [key for part in nested for key in _keys(part, f"{prefix}{name}.")] or [prefix + name]
    return keys


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nested(rest, value) if dot else value}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
