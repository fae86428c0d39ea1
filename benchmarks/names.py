"""What our parameters are called in the public sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from slotlab.config.model import SlotAttentionConfig

QKV = ("query", "key", "value")


@dataclass(frozen=True)
class Place:
    """A parameter of a source, or some of its rows: from a share of them to another, or counted from the end."""

    name: str
    part: int = 0
    parts: int = 1
    last: int | None = None  # this many rows from the end; below 0: all but so many

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        whole = tensors[self.name]
        if self.last is not None:
            return whole[-self.last :] if self.last > 0 else whole[: self.last]
        return whole.chunk(self.parts)[self.part] if self.parts > 1 else whole


@dataclass
class Places:
    """Places of our modules and parameters, by name; a module's parameters are called alike there."""

    places: dict[str, Place] = field(default_factory=dict)

    def __call__(self, ours: str, theirs: str, part: int = 0, parts: int = 1, last: int | None = None) -> None:
        self.places[ours] = Place(theirs, part, parts, last)

    def find(self, name: str) -> Place | None:
        """The place of a parameter of ours, by the longest name that is given; None if there is none."""
        above = name
        while above not in self.places:
            above, dot, _ = above.rpartition(".")
            if not dot:
                return None
        place, rest = self.places[above], name.removeprefix(above)
        there = place.name + (rest.replace(".", "_") if place.name.endswith("in_proj") else rest)
        return Place(there, place.part, place.parts, place.last)


Names = Callable[[SlotAttentionConfig], Places]


def attention(put: Places, ours: str, fused: str, out: str) -> None:
    """An attention whose queries, keys and values are one layer there."""
    for index, name in enumerate(QKV):
        put(f"{ours}.to_{name}", fused, index, 3)
    put(f"{ours}.out", out)


def feed_forward(put: Places, ours: str, norm: str, first: str, second: str) -> None:
    for index, theirs in ((0, norm), (1, first), (3, second)):
        put(f"{ours}.layers.{index}", theirs)


def mlp_decoder(put: Places, layers: int, theirs: str) -> None:
    """The broadcast MLP, whose last layer gives tokens and the mask there."""
    put("decode.first", f"{theirs}.0")
    for index in range(1, layers):
        put(f"decode.hidden.{2 * index - 1}", f"{theirs}.{2 * index}")
    put("decode.heads.tokens", f"{theirs}.{2 * layers}", last=-1)
    put("decode.mask", f"{theirs}.{2 * layers}", last=1)


def videosaur(model: SlotAttentionConfig) -> Places:
    """VideoSAUR, and SlotContrast, which has its modules."""
    put, video = Places(), model.predictor is not None
    over = ".module" if video else ""
    for index in (0, 1, 3):
        put(f"project.{index}", f"encoder{over}.output_transform.layers.{index}")
    put("recur.initialize", "initializer")
    put("recur.initialize.queries", "initializer.slots")
    corrector = f"processor{over}.corrector"
    put("recur.attend", corrector)
    put("recur.attend.norm_inputs", f"{corrector}.norm_features")
    for name, letter in zip(QKV, "qkv", strict=True):
        put(f"recur.attend.to_{name}", f"{corrector}.to_{letter}")
    put("recur.attend.mlp", f"{corrector}.mlp.layers")
    encoder_block(put, "recur.predict.move", f"processor{over}.predictor.blocks.0")
    decoder = f"decoder{over}"
    put("decode.position", f"{decoder}.pos_emb")
    if model.decoder.kind == "mlp":
        mlp_decoder(put, model.decoder.layers, f"{decoder}.mlp.layers")
        return put
    put("decode.norm_slots", f"{decoder}.norm_memory")
    for index in range(model.decoder.blocks):
        encoder_block(put, f"decode.blocks.{index}", f"{decoder}.allocator.blocks.{index}")
    for name in ("query", "key"):
        put(f"decode.to_{name}.0", f"{decoder}.norm_{name[0]}")
        put(f"decode.to_{name}.1", f"{decoder}.to_{name[0]}")
    put("decode.render.layers", f"{decoder}.renderer.layers")
    put("decode.render.heads.similarity", f"{decoder}.output_transform")
    return put


def encoder_block(put: Places, ours: str, theirs: str) -> None:
    put(f"{ours}.norm", f"{theirs}.norm1")
    attention(put, f"{ours}.attend", f"{theirs}.self_attn.qkv", f"{theirs}.self_attn.out_proj")
    feed_forward(put, f"{ours}.feed_forward", f"{theirs}.norm2", f"{theirs}.linear1", f"{theirs}.linear2")


def dinosaur(model: SlotAttentionConfig) -> Places:
    """The framework of DINOSAUR."""
    put, grouping, decoder = Places(), "perceptual_grouping.slot_attention", "object_decoder"
    for index in (0, 1, 3):
        put(f"project.{index}", f"project.{index}")
    put("recur.initialize.mean", "conditioning.slots_mu")
    put("recur.initialize.log_std", "conditioning.slots_logsigma")
    put("recur.attend", grouping)
    put("recur.attend.norm_inputs", f"{grouping}.norm_input")
    for name, letter in zip(QKV, "qkv", strict=True):
        put(f"recur.attend.to_{name}", f"{grouping}.to_{letter}")
    put("recur.attend.mlp", f"{grouping}.ff_mlp.module")
    if model.decoder.kind == "mlp":
        put("decode.position", f"{decoder}.pos_embed")
        mlp_decoder(put, model.decoder.layers, f"{decoder}.decoder")
        return put
    put("decode.begin", f"{decoder}.bos_token")
    put("decode.embed", f"{decoder}.inp_transform")
    put("decode.norm_slots", f"{decoder}.cond_transform")
    for index in range(model.decoder.blocks):
        ours, theirs = causal_block(model, index), f"{decoder}.decoder.layers.{index}"
        put(f"{ours}.norm_past", f"{theirs}.norm1")
        put(f"{ours}.norm_slots", f"{theirs}.norm2")
        for own, name in (("to_past", "self_attn"), ("to_slots", "multihead_attn")):
            attention(put, f"{ours}.{own}", f"{theirs}.{name}.in_proj", f"{theirs}.{name}.out_proj")
        feed_forward(put, f"{ours}.feed_forward", f"{theirs}.norm3", f"{theirs}.linear1", f"{theirs}.linear2")
    return put


def causal_block(model: SlotAttentionConfig, index: int) -> str:
    return "decode.last" if index == model.decoder.blocks - 1 else f"decode.blocks.{index}"


def spot(model: SlotAttentionConfig) -> Places:
    put, attend = Places(), "slot_attn.slot_attention"
    put("project.0", "slot_attn.layer_norm")
    put("project.1", "slot_attn.mlp.0")
    put("project.3", "slot_attn.mlp.2")
    put("recur.initialize.mean", "slot_attn.slot_mu")
    put("recur.initialize.log_std", "slot_attn.slot_log_sigma")
    put("recur.attend", attend)
    for name, letter in zip(QKV, "qkv", strict=True):
        put(f"recur.attend.to_{name}", f"{attend}.project_{letter}")
    put("recur.attend.mlp.0", f"{attend}.norm_mlp")
    put("recur.attend.mlp.1", f"{attend}.mlp.0")
    put("recur.attend.mlp.3", f"{attend}.mlp.2")
    put("decode.begin", "bos_tokens")
    put("decode.embed", "input_proj")
    put("decode.norm_slots", "slot_proj")
    put("decode.norm", "dec.layer_norm")
    for index in range(model.decoder.blocks):
        ours, theirs = causal_block(model, index), f"dec.blocks.{index}"
        for own, name in (("past", "self_attn"), ("slots", "encoder_decoder_attn")):
            put(f"{ours}.norm_{own}", f"{theirs}.{name}_layer_norm")
            for ours_name, letter in (*zip(QKV, "qkv", strict=True), ("out", "o")):
                which = f"{ours}.to_{own}.to_{ours_name}" if ours_name != "out" else f"{ours}.to_{own}.out"
                put(which, f"{theirs}.{name}.proj_{letter}")
        feed_forward(put, f"{ours}.feed_forward", f"{theirs}.ffn_layer_norm", f"{theirs}.ffn.0", f"{theirs}.ffn.2")
    return put


NAMES: dict[str, Names] = {"videosaur": videosaur, "slotcontrast": videosaur, "ocl": dinosaur, "spot.py": spot}
