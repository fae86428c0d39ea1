"""Checkpoints of the object-centric learning framework (OCLF): DINOSAUR with its MLP decoder."""

from __future__ import annotations

from typing import Any

from featcache.errors import IncompatibleError
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.imported.published import Published
from slotlab.imported.source import BLOCK, Derived, Rule, Source, mlp_rules

GROUP, DECODE, START = "models.perceptual_grouping", "models.object_decoder", "models.conditioning.slots"
PROJECT, ATTEND = f"{GROUP}.positional_embedding.layers.1", f"{GROUP}.slot_attention"


def _derive(published: Published) -> Derived:
    shape = published.shape
    dim, hidden, slot_dim = shape(f"{PROJECT}.0.weight")[0], *shape(f"{PROJECT}.3.weight")[::-1]
    if not published.has(f"{DECODE}.decoder.0."):
        raise IncompatibleError(f"{published.path}: its decoder is no MLP, the only one that is known")
    layers = published.blocks(f"{DECODE}.decoder.") - 1
    values: dict[str, Any] = {
        "data.tap": "block12",
        "model.slot_dim": slot_dim,
        "model.projection_hidden": hidden,
        "model.iterations": 3,
        "optim.steps": 500_000,
        "model.slot_mlp_hidden": shape(f"{ATTEND}.ff_mlp.module.1.weight")[0]
        if published.has(f"{ATTEND}.ff_mlp.")
        else 0,
        "model.decoder.kind": "mlp",
        "model.decoder.hidden": shape(f"{DECODE}.decoder.0.weight")[0],
        "model.decoder.layers": layers,
    }
    needed = {}
    if START in published.tensors:
        values |= {"model.initializer": "learnt", "model.slots": shape(START)[1]}
    else:
        values["model.initializer"] = "gaussian"
        needed["model.slots"] = "11 for MOVi-C, 24 for MOVi-E, 7 for COCO, 6 for VOC"
    assumed = ("optim.steps", "data.tap", "model.iterations")
    return Derived("dinosaur", values, assumed, needed, dim, shape(f"{DECODE}.pos_embed")[1])


def _rules(config: Config) -> list[Rule]:
    assert isinstance(config.model, SlotAttentionConfig)
    return [
        Rule(START, ("recur.initialize.queries",)),
        Rule(f"{START}_mu", ("recur.initialize.mean",)),
        Rule(f"{START}_logsigma", ("recur.initialize.log_std",)),
        Rule(f"{PROJECT}.{BLOCK}", (f"project.{BLOCK}",)),
        Rule(f"{ATTEND}.norm_input", ("recur.attend.norm_inputs",)),
        Rule(f"{ATTEND}.norm_slots", ("recur.attend.norm_slots",)),
        Rule(f"{ATTEND}.to_q", ("recur.attend.to_query",)),
        Rule(f"{ATTEND}.to_k", ("recur.attend.to_key",)),
        Rule(f"{ATTEND}.to_v", ("recur.attend.to_value",)),
        Rule(f"{ATTEND}.gru", ("recur.attend.gru",)),
        Rule(f"{ATTEND}.ff_mlp.module.{BLOCK}", (f"recur.attend.mlp.{BLOCK}",)),
        Rule(f"{DECODE}.pos_embed", ("decode.position",)),
        *mlp_rules(f"{DECODE}.decoder", config.model.decoder.layers),
    ]


OCLF = Source(
    "oclf",
    "amazon-science/object-centric-learning-framework 0a97292",
    _derive,
    _rules,
    "models.feature_extractor.model.",
)
