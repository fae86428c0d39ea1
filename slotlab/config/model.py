"""Parts and sizes of the models. No torch here: ``slotlab train --help`` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_SLOTS = 256  # a label is a byte
Masks = Literal["decoder", "attention"]  # the decoder's, or those of the attention that formed the slots
MASKS: tuple[Masks, ...] = get_args(Masks)
Initializer = Literal["gaussian", "gaussian_per_slot", "learnt", "kmeans++", "kmeans"]
ReadBy = Mapping[str, tuple[str, tuple[str, ...]]]


class Section(BaseModel):
    """A frozen, closed section of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    # Key -> another key of the section, and the values of that one with which the first is read.
    read_by: ClassVar[ReadBy] = {}

    def chosen(self, key: str) -> str:
        """A key's value as :attr:`read_by` names it."""
        return str(getattr(self, key))

    def unread(self, where: str = "") -> list[str]:
        """What was changed and has no effect, a sentence each; ``where`` is the section's own key with its dot."""
        found = []
        for name, (deciding, values) in self.read_by.items():
            chosen = self.chosen(deciding)
            given, default = getattr(self, name), type(self).model_fields[name].default
            if given != default and chosen not in values:
                found.append(f"{where}{name} = {given} has no effect with {where}{deciding} = {chosen}")
        for name in type(self).model_fields:
            if isinstance(part := getattr(self, name), Section):
                found += part.unread(f"{where}{name}.")
        return found


class DecoderConfig(Section):
    """From slots to patch tokens and masks (slotlab.models.decoders)."""

    kind: Literal["mlp", "mix", "slot_mixer", "transformer"] = "mix"
    hidden: int = Field(256, ge=1)
    layers: int = Field(2, ge=1)  # hidden ones
    blocks: int = Field(2, ge=1)  # of attention
    heads: int = Field(4, ge=1)  # of attention
    mask_temperature: float = Field(1.0, gt=0)  # of the softmax over slots; below one sharpens
    masks: Literal["soft", "gumbel", "straight_through"] = "soft"  # how slots are weighed in training
    permuted: bool = False  # train on several orders of the patches (SPOT)
    patches: int | None = Field(None, ge=1)  # decode so many random patches a step instead of all
    recompute: bool = False  # keep no activation for the backward pass: a third more time, far less memory

    read_by: ClassVar[ReadBy] = {
        "layers": ("kind", ("mlp", "mix", "slot_mixer")),
        "blocks": ("kind", ("slot_mixer", "transformer")),
        "heads": ("kind", ("slot_mixer", "transformer")),
        "mask_temperature": ("kind", ("mlp",)),
        "masks": ("kind", ("mlp",)),
        "permuted": ("kind", ("transformer",)),
        "patches": ("kind", ("mlp", "mix", "slot_mixer")),
        "recompute": ("kind", ("mlp",)),
    }

    @property
    def hard(self) -> bool:
        """Whether masks are hard in training."""
        return self.kind == "mlp" and self.masks != "soft"


class PredictorConfig(Section):
    """From the slots of one frame to where the next frame's start: makes a model recurrent over clips."""

    kind: Literal["identity", "mlp", "transformer"] = "transformer"
    hidden: int = Field(512, ge=1)
    heads: int = Field(4, ge=1)
    output_norm: bool = False  # LayerNorm behind it
    stop_gradient: bool = False  # no gradient from one frame to the one before
    refresh: int = Field(0, ge=0)  # start afresh at every N-th frame; 0: never
    first_iterations: int = Field(3, ge=1)  # of slot attention on a clip's first frame

    read_by: ClassVar[ReadBy] = {
        "hidden": ("kind", ("mlp", "transformer")),
        "heads": ("kind", ("transformer",)),
        "output_norm": ("kind", ("mlp", "transformer")),
    }


class RecurrentConfig(Section):
    """Slot attention and its recurrence over frames (slotlab.models.recurrence), on patch tokens and on pixels."""

    kind: str
    slots: int = Field(11, ge=2, le=MOST_SLOTS)
    fewest_slots: int | None = Field(None, ge=1)  # in training each sample has a random number, from here to slots
    slot_dim: int = Field(128, ge=1)
    initializer: Initializer = "gaussian"
    iterations: int = Field(3, ge=1)
    gradient: Literal["full", "implicit", "bilevel"] = "full"  # through the iterations
    temperature: float = Field(1.0, gt=0)
    slot_mlp_hidden: int = Field(512, ge=0)  # 0: none behind the GRU
    predictor: PredictorConfig | None = None  # None: frames apart

    @property
    def carries(self) -> bool:
        """Whether slots are carried from frame to frame."""
        return self.predictor is not None

    @model_validator(mode="after")
    def _recurrence_fits(self) -> RecurrentConfig:
        """No parts that do not go together, or that would never learn."""
        predictor = self.predictor
        if self.fewest_slots is not None and self.fewest_slots > self.slots:
            raise ValueError(f"fewest_slots = {self.fewest_slots} is more than slots = {self.slots}")
        if predictor is not None and predictor.refresh == 1:
            raise ValueError(
                "predictor.refresh = 1 starts every frame afresh and never predicts; set 0 for never, or more"
            )
        if predictor is not None and predictor.kind == "transformer" and self.slot_dim % predictor.heads:
            raise ValueError(f"predictor.heads {predictor.heads} do not divide slot_dim {self.slot_dim}")
        if self.gradient == "implicit":
            if self.initializer == "learnt":
                raise ValueError("gradient = implicit never reaches learnt slots; use gradient = bilevel")
            if predictor is not None and predictor.kind != "identity":
                raise ValueError("gradient = implicit never reaches a predictor; use gradient = bilevel")
        return self


class SlotAttentionConfig(RecurrentConfig):
    """DINOSAUR's model and its kin, for images and, with a predictor, for video (slotlab.models.slot_model)."""

    kind: Literal["slot_attention"] = "slot_attention"
    projection: Literal["mlp", "linear"] = "mlp"
    projection_hidden: int | None = Field(None, ge=1)  # None: the features' width
    initializer: Initializer = "kmeans"
    kmeans_rounds: int = Field(8, ge=0)
    iterations: int = Field(1, ge=1)
    decoder: DecoderConfig = DecoderConfig()

    read_by: ClassVar[ReadBy] = {
        "kmeans_rounds": ("initializer", ("kmeans",)),
        "projection_hidden": ("projection", ("mlp",)),
    }

    @model_validator(mode="after")
    def _heads_fit(self) -> SlotAttentionConfig:
        if self.decoder.kind in ("slot_mixer", "transformer"):
            width = self.slot_dim if self.decoder.kind == "slot_mixer" else self.decoder.hidden
            if width % self.decoder.heads:
                raise ValueError(f"decoder.heads {self.decoder.heads} do not divide its width of {width}")
        return self


class PixelConfig(RecurrentConfig):
    """Slot attention on the frames themselves: CNN in, spatial broadcast CNN out (slotlab.models.pixel_model)."""

    kind: Literal["pixel"] = "pixel"
    resolution: int = Field(64, ge=16)  # pixels a side that the model sees
    slot_dim: int = Field(64, ge=1)
    initializer: Literal["gaussian", "gaussian_per_slot", "learnt"] = "gaussian"
    slot_mlp_hidden: int = Field(128, ge=0)  # 0: none behind the GRU
    encoder_channels: int = Field(64, ge=1)
    decoder_channels: int = Field(64, ge=1)
    broadcast: int = Field(8, ge=1)  # side of the grid that a slot is broadcast to

    @model_validator(mode="after")
    def _decoder_reaches_the_resolution(self) -> PixelConfig:
        doublings, rest = divmod(self.resolution, self.broadcast)
        if rest or doublings < 2 or doublings & (doublings - 1):
            raise ValueError("model.resolution must be model.broadcast doubled once or more, for example 64 from 8")
        return self


class Logistic(Section):
    """``sigmoid((norm / (threshold * otsu) - 1) / width)`` of a token's norm, otsu being Otsu's threshold."""

    threshold: float = Field(gt=0)
    width: float = Field(gt=0)


class ClusteringConfig(Section):
    """Soft clusters of learnt keys, trained across time (slotlab.models.clustering.model)."""

    kind: Literal["clustering"] = "clustering"
    slots: int = Field(13, ge=2, le=MOST_SLOTS)  # the background's included; a frame uses as many as it needs
    slot_dim: int = Field(64, ge=1)
    hidden: int = Field(256, ge=1)
    iterations: int = Field(5, ge=1)
    temperature: float = Field(0.05, gt=0)
    position_weight: float = Field(1.0, ge=0)
    new_slot_distance: float = Field(0.6, gt=0)  # squared, between unit keys with position
    tracking: bool = True  # carry the slots from frame to frame of a video; false: frames apart
    merge_distance: float = Field(0.15, ge=0)  # of two slots that have become one; in tracking
    tracking_iterations: int = Field(2, ge=1)  # of a carried slot, each time
    least_mass: float = Field(1.0, ge=0)  # patches that a slot must hold to be kept, in tracking
    flow_radius: float = Field(0.34, gt=0)  # how far a token comes from, sides being 2; half as much more a frame back
    flow_frames: int = Field(5, ge=1)  # that attention flows from; in tracking
    flow_temperature: float = Field(0.1, gt=0)  # of the likeness of tokens, a cosine; in tracking
    prior_weight: float = Field(2.0, ge=0)  # power of what flows from the last frames; in tracking
    prior_floor: float = Field(0.05, gt=0)  # what a slot may claim of patches that nothing flows to; in tracking
    lasting_frames: int = Field(8, ge=1)  # before and after, in which the like of a token is looked for
    lasting_threshold: float = Field(0.8, ge=0)  # a slot whose tokens last less is background; 0: none is
    objectness: Logistic = Logistic(threshold=1.0, width=0.25)  # that the model starts from
    target_objectness: Logistic = Logistic(threshold=1.1, width=0.125)  # tighter, or the masks swell
    seed_objectness: float = Field(0.6, gt=0, lt=1)  # a token below it starts no slot

    read_by: ClassVar[ReadBy] = dict.fromkeys(
        (
            "merge_distance",
            "tracking_iterations",
            "least_mass",
            "flow_radius",
            "flow_frames",
            "flow_temperature",
            "prior_weight",
            "prior_floor",
        ),
        ("tracking", ("True",)),
    )

    @property
    def carries(self) -> bool:
        """Whether slots are carried from frame to frame."""
        return self.tracking

    @model_validator(mode="before")
    @classmethod
    def _one_number_of_a_pair(cls, values: Any) -> Any:
        """A logistic function may be changed in one number: the default has the other."""
        if not isinstance(values, Mapping):
            return values
        pairs = [name for name in ("objectness", "target_objectness") if isinstance(values.get(name), Mapping)]
        return {**values, **{name: cls.model_fields[name].default.model_dump() | values[name] for name in pairs}}


ModelConfig = SlotAttentionConfig | ClusteringConfig | PixelConfig
MODEL_KINDS = ("slot_attention", "clustering", "pixel")
