"""Settings of the parts of slot models: decoder and predictor."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from slotlab.config.section import ReadBy, Section


class DecoderConfig(Section):
    """The decoder, from slots to patch tokens and masks (slotlab.models.decoders)."""

    kind: Literal["mlp", "mix", "slot_mixer", "spatial_broadcast", "transformer"] = Field(
        "mix", description="Decoder, from slots to tokens and masks"
    )
    hidden: int = Field(256, ge=1, description="Width of its hidden layers, or of its tokens in a transformer")
    layers: int = Field(2, ge=1, description="Hidden layers of its MLP, or convolutions before the last one")
    blocks: int = Field(2, ge=1, description="Blocks of attention")
    heads: int = Field(4, ge=1, description="Heads of each attention")
    mask_temperature: float = Field(
        1.0, gt=0, description="Divisor of the mask logits before the softmax over slots; below 1 sharpens"
    )
    masks: Literal["soft", "gumbel", "straight_through"] = Field(
        "soft", description="Masks of training: soft, or hard with the gradient of soft ones"
    )
    attention_temperature: float = Field(
        1.0, gt=0, description="Divisor of its attention's logits, beside the root of a head's width"
    )
    source: Literal["slotlab", "dinosaur", "spot", "semantic"] = Field(
        "slotlab", description="Layers of the transformer: ours, or as in the source of DINOSAUR, SPOT or SemanticSlots"
    )
    permuted: bool = Field(False, description="Training on several orders of the patches (SPOT)")
    scans: Literal["rows", "all"] = Field(
        "rows",
        description="Orders of the patches in use: row by row, or the mean over all of training (SPOT)",
    )
    patches: int | None = Field(None, ge=1, description="Number of random patches decoded in a step; unset: all")
    recompute: bool = Field(
        False, description="Activations computed again in the backward pass: far less memory, a third more time"
    )

    read_by: ClassVar[ReadBy] = {
        "hidden": ("source", ("slotlab",)),
        "layers": ("kind", ("mlp", "mix", "slot_mixer", "spatial_broadcast")),
        "blocks": ("kind", ("slot_mixer", "transformer")),
        "heads": ("kind", ("slot_mixer", "transformer")),
        "mask_temperature": ("kind", ("mlp", "spatial_broadcast")),
        "masks": ("kind", ("mlp",)),
        "attention_temperature": ("kind", ("slot_mixer",)),
        "source": ("kind", ("transformer",)),
        "permuted": ("kind", ("transformer",)),
        "scans": ("permuted", ("True",)),
        "patches": ("kind", ("mlp", "mix", "slot_mixer")),
        "recompute": ("kind", ("mlp", "spatial_broadcast")),
    }

    @property
    def hard(self) -> bool:
        """Whether masks are hard in training."""
        return self.kind == "mlp" and self.masks != "soft"


class PredictorConfig(Section):
    """The predictor of the next frame's initial slots, which makes a model recurrent over clips."""

    kind: Literal["identity", "mlp", "transformer", "hungarian"] = Field(
        "transformer",
        description="Map from a frame's slots to the next one's: identity; each slot alone; all together; or none: "
        "slots start afresh and are matched to those before",
    )
    hidden: int = Field(512, ge=1, description="Width of its MLP")
    heads: int = Field(4, ge=1, description="Heads of its attention")
    attention_temperature: float = Field(
        1.0, gt=0, description="Divisor of its attention's logits, beside the root of a head's width"
    )
    output_norm: bool = Field(False, description="LayerNorm after the predictor")
    stop_gradient: bool = Field(False, description="Stop-gradient between frames")
    refresh: int = Field(0, ge=0, description="Frames after which slots start afresh; 0: never")
    first_iterations: int = Field(3, ge=1, description="Rounds of slot attention where slots start")

    read_by: ClassVar[ReadBy] = {
        "hidden": ("kind", ("mlp", "transformer")),
        "heads": ("kind", ("transformer",)),
        "attention_temperature": ("kind", ("transformer",)),
        "output_norm": ("kind", ("mlp", "transformer")),
    }
