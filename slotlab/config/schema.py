"""The configuration of a run: closed and typed."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import tomli_w
from pydantic import Field, field_validator, model_validator

from featcache.errors import UsageError
from slotlab.config.model import Masks, ModelConfig, ReadBy, Section, SlotAttentionConfig

# Form of data.normalize -> the other settings of data that it reads. What each does: slotlab.models.normalise.
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
    """The form of ``data.normalize``, and its number; 0 where it has none. ``UsageError`` for one that is not known."""
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
    """What is read, and how it is scaled."""

    tap: str | None = None  # None: the store's first; "video": the stored frames
    train_split: str = "train"
    eval_split: str = "validation"
    normalize: str = "whiten"  # whiten | whiten=K | slow=K | channel | scale | none | sample | fixed=FACTOR
    center: Literal["channel", "position"] = "channel"  # the mean that normalisation subtracts
    shrinkage: float = Field(0.1, ge=0, le=1)
    residence: Literal["auto", "disk", "host", "device"] = "auto"
    clip: int = Field(1, ge=1)  # consecutive frames a sample; more than one needs a model of video

    read_by: ClassVar[ReadBy] = {
        setting: ("normalize", tuple(form for form, read in NORMALISATIONS.items() if setting in read))
        for setting in ("center", "shrinkage")
    }

    def chosen(self, key: str) -> str:
        return parse_normalisation(self.normalize)[0] if key == "normalize" else super().chosen(key)

    @field_validator("normalize")
    @classmethod
    def _known(cls, kind: str) -> str:
        try:
            parse_normalisation(kind)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return kind


class LossConfig(Section):
    """Weights of the losses (slotlab.training.losses); one at 0 is not computed. Each is logged apart."""

    feature_mse: float = Field(1.0, ge=0)  # of standardised features, 1 is the mean predictor
    cosine: float = Field(0.0, ge=0)
    temporal_similarity: float = Field(0.0, ge=0)  # VideoSAUR
    slot_contrast: float = Field(0.0, ge=0)  # SlotContrast
    diversity: float = Field(0.0, ge=0)
    sharpness: float = Field(0.0, ge=0)
    similarity_shift: int = Field(1, ge=1)  # frames ahead
    similarity_temperature: float = Field(0.075, gt=0)
    contrast_temperature: float = Field(0.1, gt=0)

    @property
    def reconstructs(self) -> bool:
        """Whether a loss looks at the reconstruction."""
        return self.feature_mse > 0 or self.cosine > 0

    def weights(self) -> dict[str, float]:
        """Name -> weight of the losses that are on."""
        names = ("feature_mse", "cosine", "temporal_similarity", "slot_contrast", "diversity", "sharpness")
        return {name: weight for name in names if (weight := getattr(self, name)) > 0}


class OptimConfig(Section):
    """Adam, linear warm-up, decay, clipping."""

    steps: int = Field(800, ge=1)
    batch_size: int = Field(32, ge=1)  # samples a step, of all ranks together
    accumulate: int = Field(1, ge=1)  # parts of a rank's batch that pass the model one after the other
    learning_rate: float = Field(1e-3, gt=0)
    reference_batch: int | None = Field(None, ge=1)  # the rate is for this batch size; None: for the one given
    scaling: Literal["linear", "sqrt"] = "sqrt"  # how the rate grows with the batch
    warmup_steps: int = Field(50, ge=0)  # at most a fifth of the steps
    warmup_samples: int | None = Field(None, ge=0)  # instead of steps: the same for every batch size
    decay: Literal["cosine", "exponential", "constant"] = "cosine"
    half_life: int = Field(100_000, ge=1)  # steps, of the exponential decay
    final_learning_rate: float = Field(0.0, ge=0)  # of the cosine
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema: float = Field(0.0, ge=0, lt=1)  # decay of averaged weights, which are then the ones evaluated; 0: none
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    cuda_graphs: bool = False  # of what is compiled: a step's many small kernels are launched as a few graphs

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
    """Everything that decides a run's result, besides the store itself."""

    seed: int = Field(0, ge=0, lt=1 << 63)
    data: DataConfig = DataConfig()
    model: ModelConfig = Field(SlotAttentionConfig(), discriminator="kind")
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    published_masks: Masks = "decoder"  # scored first, drawn, written to files
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    evaluate_every: int = Field(0, ge=0)  # steps between looks at the masks of the evaluation split; 0: none
    evaluate_videos: int = Field(8, ge=1)  # that such a look takes

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        recurrent = self.model.kind != "clustering" and self.model.predictor is not None
        if self.data.clip > 1 and self.model.kind != "clustering" and not recurrent:
            raise ValueError("data.clip above 1 needs a model of video: set model.predictor.kind")
        if recurrent and self.data.clip == 1:
            raise ValueError("model.predictor needs clips: set data.clip to 2 or more")
        if self.loss.temporal_similarity and self.model.kind != "slot_attention":
            raise ValueError("loss.temporal_similarity needs model.kind = slot_attention, whose decoders predict it")
        if self.loss.temporal_similarity and self.data.clip <= self.loss.similarity_shift:
            raise ValueError("loss.temporal_similarity needs data.clip above loss.similarity_shift")
        if not self.loss.weights():
            raise ValueError("no loss is on: give one of loss.feature_mse, loss.cosine ... a weight")
        if self.loss.slot_contrast and self.optim.accumulate > 1:
            raise ValueError(
                "loss.slot_contrast needs optim.accumulate=1: it tells a slot apart from all others of the batch"
            )
        if self.loss.slot_contrast and not recurrent:
            raise ValueError("loss.slot_contrast needs slots carried over clips: set model.predictor.kind")
        if self.loss.slot_contrast and self.model.kind != "clustering" and self.model.fewest_slots is not None:
            raise ValueError("loss.slot_contrast needs all slots in every sample: leave out model.fewest_slots")
        hard = self.model.kind == "slot_attention" and self.model.decoder.hard
        if hard and (self.loss.diversity or self.loss.sharpness):
            raise ValueError(
                "loss.diversity and loss.sharpness need model.decoder.masks = soft: hard masks neither overlap nor blur"
            )
        if (self.model.kind == "pixel") != (self.data.tap == "video"):
            raise ValueError("model.kind = pixel goes with data.tap = video, the stored frames, and they with it")
        return self

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))
