"""The configuration of a run: frozen, closed and typed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import tomli_w
from pydantic import Field, field_validator, model_validator

from featcache.errors import UsageError
from featcache.words import Residence
from slotlab.config.model import (
    ForecastConfig,
    Masks,
    ModelConfig,
    RecurrentConfig,
    SlotAttentionConfig,
)
from slotlab.config.section import ReadBy, Section

Center = Literal["channel", "position"]

# Form of data.normalize -> the other data settings it uses. slotlab.models.normalise explains each form.
NORMALISATIONS: dict[str, tuple[str, ...]] = {
    "whiten": ("center", "shrinkage"),
    "whiten=K": ("center",),
    "slow=K": ("center",),
    "channel": ("center",),
    "scale": ("center",),
    "none": (),
    "sample": (),
    "fixed=FACTOR": (),
}


def parse_normalisation(kind: str) -> tuple[str, float]:
    """The form of ``data.normalize`` and its number, or 0 if it has none. ``UsageError`` for an unknown one."""
    name, equals, value = kind.partition("=")
    if not equals and name in NORMALISATIONS:
        return name, 0.0
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number > 0:
        if (form := f"{name}=K") in NORMALISATIONS and number.is_integer():
            return form, number
        if (form := f"{name}=FACTOR") in NORMALISATIONS:
            return form, number
    raise UsageError(
        f"normalisation {kind!r} is not known; choose one of {', '.join(NORMALISATIONS)} with K, FACTOR > 0"
    )


class DataConfig(Section):
    """The data to read, and its normalisation."""

    tap: str | None = Field(None, description="Tap to read; video: the stored frames; unset: the store's first")
    target: str | None = Field(
        None,
        description="Tap to reconstruct, and to read by an autoregressive decoder; unset: the one that slots read",
    )
    train_split: str = Field("train", description="Split to train on")
    eval_split: str = Field("validation", description="Split to score and to look at")
    normalize: str = Field(
        "whiten",
        examples=list(NORMALISATIONS),
        description="Normalisation by the store's statistics; K is a number of channels",
    )
    center: Center = Field(
        "channel", description="Mean to subtract: of each channel, or of each channel at each patch position"
    )
    shrinkage: float = Field(0.1, ge=0, le=1, description="Shrinkage of the covariance towards equal variances")
    residence: Residence = Field("auto", description="Place of the features while they stream; auto: where they fit")
    clip: int = Field(1, ge=1, description="Consecutive frames in a sample; more than 1 needs a video model")
    shares: int = Field(1, ge=1, description="Shares of the videos that give equal parts of every batch, as of ranks")

    read_by: ClassVar[ReadBy] = {
        setting: ("normalize", tuple(form for form, read in NORMALISATIONS.items() if setting in read))
        for setting in ("center", "shrinkage")
    }

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that are read, by name; none where the store's first is."""
        return tuple(tap for tap in (self.tap, self.target) if tap is not None)

    def scored(self, known: Sequence[str]) -> str:
        """The split to score of data with the splits ``known``, where nobody names one.

        It is ``eval_split``; of data that lack it (DAVIS names it ``val``), the only one besides the training split.
        """
        others = [split for split in known if split != self.train_split]
        return others[0] if self.eval_split not in known and len(others) == 1 else self.eval_split

    def chosen(self, key: str) -> str:
        return parse_normalisation(self.normalize)[0] if key == "normalize" else super().chosen(key)

    @property
    def directions(self) -> bool:
        """Whether channels are directions of the training set, so that parameters mean nothing in another set's."""
        return parse_normalisation(self.normalize)[0].endswith("=K")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.target is not None and self.tap is None:
            raise ValueError("data.target needs data.tap: name the tap in which slots are found, too")
        return self

    @field_validator("normalize")
    @classmethod
    def _known(cls, kind: str) -> str:
        try:
            parse_normalisation(kind)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return kind


def _weight(default: float, title: str, of: str) -> Any:
    """A field for the weight of a loss, with the loss's title on charts and its description."""
    return Field(default, ge=0, title=title, description=f"Weight of {of}")


class LossConfig(Section):
    """Weights of the losses (slotlab.training.losses). Losses of weight 0 are not computed; the others are logged."""

    feature_mse: float = _weight(
        1.0, "Feature MSE", "the squared error; of standardised features, 1 is the mean predictor"
    )
    layer_norm_mse: float = _weight(0.0, "Feature MSE, LayerNorm", "the squared error of tokens after a LayerNorm")
    cosine: float = _weight(0.0, "Cosine", "one minus the cosine")
    structure: float = _weight(0.0, "Structure", "one minus the structural similarity of tokens and their neighbours")
    temporal_similarity: float = _weight(0.0, "Temporal similarity", "the temporal similarity (VideoSAUR)")
    slot_contrast: float = _weight(0.0, "Slot contrast", "the slot contrast (SlotContrast)")
    assignment: float = _weight(0.0, "Assignment", "the cross-entropy of the slot that a patch belongs to")
    slot_mse: float = _weight(0.0, "Slot MSE", "the squared error of predicted slots, in units of their variance")
    slot_huber: float = _weight(0.0, "Slot error", "the same, of which large ones count by their size, not its square")
    diversity: float = _weight(0.0, "Diversity", "the mean cosine between masks")
    slot_diversity: float = _weight(0.0, "Slot diversity", "the mean cosine between slots")
    sharpness: float = _weight(0.0, "Sharpness", "the masks' entropy")
    similarity_shift: int = Field(1, ge=1, description="Frames that the temporal similarity looks ahead")
    similarity_temperature: float = Field(0.075, gt=0, description="Divisor of the temporal similarity's cosines")
    contrast_temperature: float = Field(0.1, gt=0, description="Divisor of the slot contrast's cosines")

    @property
    def reconstructs(self) -> bool:
        """Whether a loss uses the reconstruction."""
        return any((self.feature_mse, self.layer_norm_mse, self.cosine, self.structure))

    def weights(self) -> dict[str, float]:
        """The weights of the losses in use, by name."""
        return {name: weight for name in LOSS_NAMES if (weight := getattr(self, name)) > 0}


# Loss -> its title on charts, and what it is. slotlab.training.losses computes them.
LOSS_NAMES: dict[str, tuple[str, str]] = {
    name: (field.title, str(field.description).removeprefix("Weight of "))
    for name, field in LossConfig.model_fields.items()
    if field.title
}


class OptimConfig(Section):
    """Adam, linear warm-up, decay, clipping."""

    steps: int = Field(800, ge=1, description="Number of optimiser steps")
    batch_size: int = Field(32, ge=1, description="Samples in a step, over all ranks")
    accumulate: int = Field(1, ge=1, description="Parts in which a rank's batch passes through the model")
    learning_rate: float = Field(1e-3, gt=0, description="Learning rate after the warm-up")
    reference_batch: int | None = Field(
        None, ge=1, description="Batch size that the learning rate is for; unset: the batch size in use"
    )
    scaling: Literal["linear", "sqrt"] = Field("sqrt", description="Growth of the learning rate with the batch size")
    warmup_steps: int = Field(50, ge=0, description="Steps of linear warm-up, at most a fifth of the steps")
    warmup_samples: int | None = Field(
        None, ge=0, description="Samples of warm-up, instead of steps: the same for every batch size"
    )
    decay: Literal["cosine", "exponential", "constant"] = Field(
        "cosine", description="Decay of the rate after the warm-up"
    )
    half_life: int = Field(100_000, ge=1, description="Steps in which the exponential decay halves the rate")
    final_learning_rate: float = Field(0.0, ge=0, description="Rate at the end of the cosine")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay")
    clip_norm: float = Field(1.0, gt=0, description="Gradient norm to clip to")
    ema: float = Field(
        0.0, ge=0, lt=1, description="Decay of the averaged weights, which are then evaluated; 0: no average"
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="Precision of the step; tf32: float32 with TensorFloat-32 matrix products on NVIDIA GPUs",
    )
    compile: bool = Field(False, description="Compilation of the step by torch.compile")
    cuda_graphs: bool = Field(False, description="CUDA graphs of the compiled step: few launches for small kernels")

    read_by: ClassVar[ReadBy] = {
        "half_life": ("decay", ("exponential",)),
        "final_learning_rate": ("decay", ("cosine",)),
    }

    @model_validator(mode="after")
    def _graphs_fit(self) -> Self:
        if self.cuda_graphs and not self.compile:
            raise ValueError("optim.cuda_graphs needs optim.compile=true, which finds what a graph may hold")
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(
                "optim.cuda_graphs needs optim.accumulate=1: a replay writes over the gradients of the one before"
            )
        return self


class Config(Section):
    """Everything that decides a run's result, except the store."""

    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of parameters, of the order of samples, and of all draws")
    data: DataConfig = DataConfig()
    model: ModelConfig = Field(SlotAttentionConfig(), discriminator="kind")
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    published_masks: Masks = Field("decoder", description="Kind of masks to score first, draw, and write to files")
    log_every: int = Field(10, ge=1, description="Steps between logged rows")
    checkpoint_every: int = Field(200, ge=1, description="Steps between checkpoints")
    evaluate_every: int = Field(
        0, ge=0, description="Steps between looks at the masks of the evaluation split; 0: none"
    )
    evaluate_videos: int = Field(8, ge=1, description="Number of videos in a look")

    @property
    def any_grid(self) -> bool:
        """Whether a finished run may be used on features of another input size: it knows nothing of places."""
        return self.model.any_grid and self.data.center == "channel"

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        recurrent = self.model.recurrent
        if isinstance(self.model, ForecastConfig):
            if self.data.clip <= self.model.burn_in:
                raise ValueError("data.clip must be above model.burn_in: the frames after it are predicted")
            if (self.data.normalize, self.data.center) != ("channel", "position"):
                needs = "data.normalize = channel and data.center = position"
                raise ValueError(f"model.kind = {self.model.kind} needs {needs}, in which its errors are told")
        if self.data.clip > 1 and not recurrent and self.model.frames_a_step is None:
            raise ValueError("data.clip above 1 needs a video model: set model.predictor.kind")
        if recurrent and self.data.clip == 1 and not self.model.trains_on_frames:
            raise ValueError("model.predictor needs clips: set data.clip to 2 or more")
        if self.loss.temporal_similarity and self.model.kind != "slot_attention":
            raise ValueError("loss.temporal_similarity needs model.kind = slot_attention, whose decoders predict it")
        if self.loss.temporal_similarity and self.data.clip <= self.loss.similarity_shift:
            raise ValueError("loss.temporal_similarity needs data.clip above loss.similarity_shift")
        if not self.loss.weights():
            raise ValueError("no loss is on: give one of loss.feature_mse, loss.cosine ... a weight")
        if self.loss.slot_contrast and self.optim.accumulate > 1:
            raise ValueError(
                "loss.slot_contrast needs optim.accumulate=1: it contrasts each slot with all others of the batch"
            )
        if self.loss.slot_contrast and not (recurrent and self.data.clip > 1):
            raise ValueError("loss.slot_contrast needs slots carried over clips: set model.predictor.kind")
        if self.loss.slot_contrast and isinstance(self.model, RecurrentConfig) and self.model.fewest_slots is not None:
            raise ValueError("loss.slot_contrast needs all slots in every sample: leave out model.fewest_slots")
        if isinstance(self.model, SlotAttentionConfig) and self.model.first_slots and not self.loss.reconstructs:
            raise ValueError("model.first_slots needs the reconstruction, whose error says where slots are added")
        if self.loss.assignment and self.model.kind != "agglomerative":
            raise ValueError("loss.assignment needs model.kind = agglomerative, whose segments are what is assigned")
        for name in ("slot_mse", "slot_huber"):
            if getattr(self.loss, name) and self.model.kind != "dynamics":
                raise ValueError(f"loss.{name} needs model.kind = dynamics, which predicts slots")
        hard = self.model.kind == "slot_attention" and self.model.decoder.hard
        if hard and (self.loss.diversity or self.loss.sharpness):
            raise ValueError(
                "loss.diversity and loss.sharpness need model.decoder.masks = soft: hard masks neither overlap nor blur"
            )
        if self.data.target is not None and self.model.kind != "slot_attention":
            raise ValueError("data.target needs model.kind = slot_attention: other models reconstruct what they read")
        if (self.model.kind == "pixel") != (self.data.tap == "video"):
            raise ValueError("model.kind = pixel needs data.tap = video (stored frames), which no other model reads")
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))
