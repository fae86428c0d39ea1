"""Decoders: slots -> patch tokens and masks."""

from __future__ import annotations

from slotlab.models.decoders.autoregressive import TransformerDecoder
from slotlab.models.decoders.base import Decoded, Decoder, Sizes
from slotlab.models.decoders.broadcast import MLPDecoder
from slotlab.models.decoders.mixing import MixDecoder, SlotMixerDecoder
from slotlab.models.decoders.spatial import SpatialBroadcastDecoder

__all__ = [
    "DECODERS",
    "Decoded",
    "Decoder",
    "MLPDecoder",
    "MixDecoder",
    "Sizes",
    "SlotMixerDecoder",
    "SpatialBroadcastDecoder",
    "TransformerDecoder",
]

DECODERS: dict[str, type[Decoder]] = {
    "mlp": MLPDecoder,
    "mix": MixDecoder,
    "slot_mixer": SlotMixerDecoder,
    "spatial_broadcast": SpatialBroadcastDecoder,
    "transformer": TransformerDecoder,
}
