"""Settings of the models, and remedies against collapse. Imports no torch, so that a wrong key fails at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from slotlab.config.parts import DecoderConfig, PredictorConfig
from slotlab.config.section import Gone, ReadBy, Section

MOST_SLOTS = 256  # a label is a byte
Masks = Literal["decoder", "attention"]  # masks of the decoder, or of the attention that formed the slots
MASKS: tuple[Masks, ...] = get_args(Masks)
Gradient = Literal["full", "implicit", "bilevel"]
GRUHidden = Literal["slots", "normalised"]
Initializer = Literal["gaussian", "gaussian_means", "gaussian_per_slot", "learnt", "kmeans++", "kmeans", "saliency"]
FROM_TOKENS = ("kmeans++", "kmeans", "saliency")  # initializers that start slots at projected tokens
ScoredBy = Literal["eval", "rollout"]  # commands that score a run, and names of their files in its folder
Sign = Literal["one_slot", "same_masks", "flat_attention", "same_slots", "lost_slots"]  # signs of a collapse


class Remedy(NamedTuple):
    """A setting that may help: a dotted key and its new value, or a factor on its present one."""

    key: str
    value: Any = None
    factor: float = 1.0


Remedies = Mapping[Sign, tuple[Remedy, ...]]


class KindConfig(Section):
    """A kind of model: what every one has, with what holds where the kind does not say otherwise."""

    kind: str
    slots: int

    # What to try against a sign of collapse (slotlab.scoring.collapse).
    remedies: ClassVar[Remedies] = {}
    frames_a_step: ClassVar[int | None] = None  # frames of a clip that a step reads, drawn anew each time; None: all
    scored_by: ClassVar[ScoredBy] = "eval"

    any_grid: ClassVar[bool] = False  # whether nothing it learns depends on the grid, so that a finer one may be used

    @property
    def on_host(self) -> bool:
        """Whether a step computes on the host, which then waits for the device."""
        return False

    @property
    def carries(self) -> bool:
        """Whether slots are carried from frame to frame."""
        return False

    @property
    def recurrent(self) -> bool:
        """Whether it is trained on whole clips, a frame's slots starting from those of the frame before."""
        return False

    @property
    def trains_on_frames(self) -> bool:
        """Whether a recurrent model may be trained on single frames: nothing in it learns from the frame before."""
        return False


class RecurrentConfig(KindConfig):
    """Slot attention and its recurrence over frames (slotlab.models.recurrence), on patch tokens and on pixels."""

    slots: int = Field(11, ge=2, le=MOST_SLOTS, description="Number of slots in a frame")
    fewest_slots: int | None = Field(
        None, ge=1, description="Smallest number of slots in a training sample, drawn at random; unset: all slots"
    )
    slot_dim: int = Field(128, ge=1, description="Width of a slot")
    initializer: Initializer = Field("gaussian", description="Source of the initial slots")
    iterations: int = Field(3, ge=1, description="Rounds of slot attention")
    gradient: Gradient = Field(
        "full", description="Rounds with a gradient: all; the last; the last, then straight to the initial slots"
    )
    temperature: float = Field(
        1.0, gt=0, description="Divisor of the attention's logits; below 1 sharpens the competition"
    )
    gru_hidden: GRUHidden = Field(
        "slots", description="Hidden state of the GRU: the slots, or their LayerNorm (VideoSAUR, SlotContrast)"
    )
    slot_mlp_hidden: int = Field(512, ge=0, description="Width of the residual MLP after the GRU; 0: none")
    predictor: PredictorConfig | None = Field(
        None, description="Recurrence over the frames of a clip; unset: frames apart"
    )

    # Remedies for slot attention, on tokens and on pixels.
    remedies: ClassVar[Remedies] = {
        "same_masks": (Remedy("model.temperature", factor=0.5),),
        "flat_attention": (Remedy("model.temperature", factor=0.5),),
        "same_slots": (Remedy("model.initializer", "gaussian_per_slot"),),
        "lost_slots": (
            Remedy("model.predictor.stop_gradient", True),
            Remedy("model.predictor.output_norm", True),
            Remedy("loss.slot_contrast", 0.5),
        ),
    }

    @property
    def carries(self) -> bool:
        return self.predictor is not None

    @property
    def recurrent(self) -> bool:
        return self.predictor is not None

    @property
    def trains_on_frames(self) -> bool:
        return self.predictor is not None and self.predictor.kind == "identity"

    @property
    def on_host(self) -> bool:
        return self.predictor is not None and self.predictor.kind == "hungarian"

    @model_validator(mode="after")
    def _recurrence_fits(self) -> RecurrentConfig:
        """Refuse parts that contradict each other, or that would never learn."""
        predictor = self.predictor
        if self.fewest_slots is not None and self.fewest_slots > self.slots:
            raise ValueError(f"fewest_slots = {self.fewest_slots} is more than slots = {self.slots}")
        if predictor is not None and predictor.refresh == 1:
            raise ValueError(
                "predictor.refresh = 1 starts every frame afresh and never predicts; set 0 for never, or more"
            )
        if predictor is not None and predictor.kind == "transformer" and self.slot_dim % predictor.heads:
            raise ValueError(f"predictor.heads {predictor.heads} do not divide slot_dim {self.slot_dim}")
        if self.on_host and self.fewest_slots is not None:
            raise ValueError("predictor.kind = hungarian needs all slots in every sample: leave out fewest_slots")
        if self.gradient == "implicit":
            if self.initializer == "learnt":
                raise ValueError("gradient = implicit never reaches learnt slots; use gradient = bilevel")
            if predictor is not None and predictor.kind not in ("identity", "hungarian"):
                raise ValueError("gradient = implicit never reaches a predictor; use gradient = bilevel")
        return self


class SlotAttentionConfig(RecurrentConfig):
    """DINOSAUR and its relatives, for images and, with a predictor, for video (slotlab.models.slot_model)."""

    kind: Literal["slot_attention"] = "slot_attention"
    projection: Literal["mlp", "linear", "wide"] = Field(
        "mlp",
        description="Map of tokens before slots attend: LN-Linear-ReLU-Linear; one linear layer; "
        "the first, as wide as the features (SPOT)",
    )
    projection_hidden: int | None = Field(
        None, ge=1, description="Hidden width of the projection; unset: the features' width"
    )
    initializer: Initializer = "kmeans"
    kmeans_rounds: int = Field(8, ge=0, description="Rounds of k-means")
    saliency_weight: float = Field(
        0.5, ge=0, description="Weight of a patch's likeness to the whole frame, which makes it less salient"
    )
    first_slots: int | None = Field(
        None,
        ge=1,
        description="Number of slots at first; half of all from a tenth of the steps, all from a quarter (SlotCurri); "
        "unset: all",
    )
    there_and_back: bool = Field(
        False, description="Videos gone through once more in use, from the last frame to the first (SlotCurri)"
    )
    iterations: int = Field(1, ge=1)
    decoder: DecoderConfig = DecoderConfig()

    read_by: ClassVar[ReadBy] = {
        "kmeans_rounds": ("initializer", ("kmeans",)),
        "saliency_weight": ("initializer", ("saliency",)),
        "projection_hidden": ("projection", ("mlp", "wide")),
    }
    remedies: ClassVar[Remedies] = {
        "one_slot": (
            Remedy("model.initializer", "kmeans"),
            Remedy("model.projection", "mlp"),
            Remedy("data.normalize", "whiten"),
        ),
        "same_masks": (
            Remedy("model.decoder.mask_temperature", factor=0.5),
            Remedy("model.temperature", factor=0.5),
            Remedy("model.decoder.kind", "mix"),
        ),
        "flat_attention": (Remedy("model.temperature", factor=0.5), Remedy("data.normalize", "whiten")),
        "same_slots": (Remedy("model.initializer", "kmeans"), Remedy("model.initializer", "gaussian_per_slot")),
        "lost_slots": RecurrentConfig.remedies["lost_slots"],
    }

    @model_validator(mode="after")
    def _curriculum_fits(self) -> SlotAttentionConfig:
        if self.there_and_back and self.predictor is None:
            raise ValueError("there_and_back needs slots carried over a video: set predictor.kind")
        if self.there_and_back and self.on_host:
            raise ValueError("there_and_back needs slots that one frame gives to the next: another predictor.kind")
        if self.first_slots is None:
            return self
        if self.first_slots > self.slots // 2:
            raise ValueError(f"first_slots = {self.first_slots} is more than half of slots = {self.slots}")
        if self.initializer != "learnt":
            raise ValueError("first_slots needs initializer = learnt: new slots start as those with a large error")
        if self.fewest_slots is not None:
            raise ValueError("first_slots and fewest_slots both say how many slots train: leave one out")
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> SlotAttentionConfig:
        if self.projection == "wide" and self.initializer in FROM_TOKENS:
            raise ValueError(f"initializer = {self.initializer} starts slots as projected tokens: projection = mlp")
        if self.decoder.kind in ("slot_mixer", "transformer") and self.decoder.source == "slotlab":
            width = self.slot_dim if self.decoder.kind == "slot_mixer" else self.decoder.hidden
            if width % self.decoder.heads:
                raise ValueError(f"decoder.heads {self.decoder.heads} do not divide its width of {width}")
        return self


class PixelConfig(RecurrentConfig):
    """Slot attention on the frames themselves: CNN in, spatial broadcast CNN out (slotlab.models.pixel_model)."""

    kind: Literal["pixel"] = "pixel"
    resolution: int = Field(64, ge=16, description="Pixels a side that the model sees")
    slot_dim: int = Field(64, ge=1)
    initializer: Literal["gaussian", "gaussian_means", "gaussian_per_slot", "learnt"] = "gaussian"
    slot_mlp_hidden: int = Field(128, ge=0)
    encoder_channels: int = Field(64, ge=1, description="Channels of the encoder")
    decoder_channels: int = Field(64, ge=1, description="Channels of the decoder")
    broadcast: int = Field(8, ge=1, description="Side of the grid that a slot is broadcast to")

    @model_validator(mode="after")
    def _decoder_reaches_the_resolution(self) -> PixelConfig:
        doublings, rest = divmod(self.resolution, self.broadcast)
        if rest or doublings < 2 or doublings & (doublings - 1):
            raise ValueError("model.resolution must be model.broadcast doubled once or more, for example 64 from 8")
        return self


class Logistic(Section):
    """``sigmoid((norm / (threshold * otsu) - 1) / width)`` of a token's norm, otsu being Otsu's threshold."""

    threshold: float = Field(gt=0, description="Norm at which it is one half, divided by Otsu's threshold")
    width: float = Field(gt=0, description="Width of the transition, as a share of that norm")


class ClusteringConfig(KindConfig):
    """Soft clusters of learnt keys, trained across time (slotlab.models.clustering.model)."""

    kind: Literal["clustering"] = "clustering"
    slots: int = Field(13, ge=2, le=MOST_SLOTS, description="Largest number of slots in a frame, background included")
    slot_dim: int = Field(64, ge=1, description="Channels of a key: the first ones of a token")
    hidden: int = Field(256, ge=1, description="Width of the learnt corrections and of the decoder")
    iterations: int = Field(5, ge=1, description="Rounds that refine the slots")
    temperature: float = Field(
        0.05, gt=0, description="Divisor of the squared distances between keys and slots; smaller is sharper"
    )
    position_weight: float = Field(1.0, ge=0, description="Weight of a patch's position beside its key")
    new_slot_distance: float = Field(
        0.6, gt=0, description="Squared distance from all slots beyond which a token starts a new one"
    )
    tracking: bool = Field(True, description="Slots carried from frame to frame of a video; false: frames apart")
    merge_distance: float = Field(0.15, ge=0, description="Squared distance below which two carried slots are merged")
    flow_frames: int = Field(5, ge=1, description="Number of past frames that attention flows from")
    prior_weight: float = Field(2.0, ge=0, description="Exponent of the prior that flows from the past; 0: no prior")
    objectness: Logistic = Field(
        Logistic(threshold=1.0, width=0.25), description="Objectness that the model starts from"
    )
    target_objectness: Logistic = Field(
        Logistic(threshold=1.1, width=0.125), description="Objectness in the target; tighter, or the masks swell"
    )

    read_by: ClassVar[ReadBy] = dict.fromkeys(
        ("merge_distance", "flow_frames", "prior_weight"), ("tracking", ("True",))
    )
    gone: ClassVar[Mapping[str, Gone]] = {
        # Constants of slotlab.models.clustering.
        "seed_objectness": Gone.fixed(0.6),
        "tracking_iterations": Gone.fixed(2),
        "least_mass": Gone.fixed(1.0),
        "flow_radius": Gone.fixed(0.34),
        "flow_temperature": Gone.fixed(0.1),
        "prior_floor": Gone.fixed(0.05),
        # Earlier versions gave short-lived slots to the background, in use but not in training.
        "lasting_frames": Gone((8,), "is gone"),
        "lasting_threshold": Gone((0.8, 0), "is gone: short-lived slots stay objects"),
    }
    remedies: ClassVar[Remedies] = {
        "one_slot": (Remedy("model.objectness.threshold", 0.8),),
        "same_masks": (Remedy("model.temperature", factor=0.5),),
        "flat_attention": (Remedy("model.temperature", factor=0.5),),
        "lost_slots": (Remedy("model.merge_distance", 0.05),),
    }

    frames_a_step: ClassVar[int | None] = 2

    @property
    def carries(self) -> bool:
        return self.tracking

    @model_validator(mode="before")
    @classmethod
    def _one_number_of_a_pair(cls, values: Any) -> Any:
        """Fill in the default of the other number where only one number of a logistic function is set."""
        if not isinstance(values, Mapping):
            return values
        pairs = [name for name in ("objectness", "target_objectness") if isinstance(values.get(name), Mapping)]
        return {**values, **{name: cls.model_fields[name].default.model_dump() | values[name] for name in pairs}}


class AgglomerativeConfig(KindConfig):
    """Slots that start from segments of learnt keys, as many as a frame has (slotlab.models.agglomerative)."""

    kind: Literal["agglomerative"] = "agglomerative"
    slots: int = Field(64, ge=2, le=MOST_SLOTS, description="Most slots of a frame")
    slot_dim: int = Field(128, ge=1, description="Width of a key, and of a slot")
    hidden: int = Field(256, ge=1, description="Width of the learnt correction of the keys")
    centre: float = Field(0.0, ge=0, le=1, description="Share of a frame's mean that is taken from its tokens")
    cut: float = Field(0.35, gt=0, description="Distance, 1 less the affinity, up to which segments are joined")
    temperature: float = Field(0.4, gt=0, description="Divisor of the cosines of slots and keys; smaller is sharper")
    near_weight: float = Field(0.5, ge=0, description="Weight of the logarithm of a slot's share around a patch")
    train_cut: float = Field(0.5, gt=0, description="Cut of the segments that teach; coarser, or parts are learnt")
    tracking: bool = Field(True, description="Slots carried from frame to frame of a video; false: frames apart")
    prior_weight: float = Field(0.0, ge=0, description="Exponent of the prior that flows from the past; 0: no prior")

    read_by: ClassVar[ReadBy] = {"prior_weight": ("tracking", ("True",))}
    remedies: ClassVar[Remedies] = {
        "one_slot": (Remedy("model.cut", factor=0.8),),
        "same_masks": (Remedy("model.temperature", factor=0.5),),
        "flat_attention": (Remedy("model.temperature", factor=0.5),),
    }
    frames_a_step: ClassVar[int | None] = 2
    any_grid: ClassVar[bool] = True
    gone: ClassVar[Mapping[str, Gone]] = {
        "train_temperature": Gone.fixed(0.1),
        "share_weight": Gone(
            (0.5,),
            "is gone: a slot's share around a patch counts, by near_weight",
            "made by a version in which a slot's share of the whole frame counted; its masks change a little",
        ),
    }

    @property
    def on_host(self) -> bool:
        return True  # segments are found there

    @property
    def carries(self) -> bool:
        return self.tracking


class ForecastConfig(KindConfig):
    """What predictors of later frames share."""

    scored_by: ClassVar[ScoredBy] = "rollout"

    burn_in: int = Field(6, ge=1, description="Frames that are seen before the first predicted one")
    layers: int = Field(2, ge=1, description="Blocks of attention")
    width: int = Field(64, ge=2, description="Width of its tokens")
    heads: int = Field(4, ge=1, description="Heads of each attention")

    @property
    def recurrent(self) -> bool:
        return True

    @model_validator(mode="after")
    def _heads_fit(self) -> ForecastConfig:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}")
        return self


class DynamicsConfig(ForecastConfig):
    """A predictor of the next frames' slots from those of the last ones (slotlab.models.dynamics.model)."""

    kind: Literal["dynamics"] = "dynamics"
    slots: int = Field(2, ge=2, le=MOST_SLOTS, description="Number of slots in a frame; set to that of the tracks")
    attention: Literal["joint", "sequential", "parallel"] = Field(
        "joint", description="Attention over slots and frames together, by turns, or by both at once"
    )
    channels: int = Field(48, ge=1, description="Directions of most variance in which a slot's feature is kept")
    refined: bool = Field(
        False, description="Slots' places by the frame's edges, where the tracks have them, and not by their masks"
    )
    kinematics: bool = Field(True, description="Velocity and acceleration as inputs; predictions are changes of speed")
    masked_slots: int = Field(0, ge=0, description="Slots of a training clip that are hidden after its first frame")
    mirror: bool = Field(True, description="Half of the training clips mirrored, left for right; none with actions")
    actions: int | None = Field(
        None, ge=0, description="Numbers of a frame's action, which lead to the next; unset: the tracks', 0: none read"
    )

    @property
    def carries(self) -> bool:
        return True


class DenseConfig(ForecastConfig):
    """A predictor of patch tokens, without slots, to compare with (slotlab.models.dynamics.dense)."""

    kind: Literal["dense"] = "dense"
    slots: Literal[1] = Field(1, description="It finds no slots: its one mask is the frame")
    burn_in: int = Field(3, ge=1, description="Frames that are seen before the first predicted one")
    width: int = Field(128, ge=2, description="Width of its tokens")


ModelConfig = SlotAttentionConfig | ClusteringConfig | AgglomerativeConfig | PixelConfig | DynamicsConfig | DenseConfig
MODEL_KINDS: tuple[str, ...] = tuple(part.model_fields["kind"].default for part in get_args(ModelConfig))
