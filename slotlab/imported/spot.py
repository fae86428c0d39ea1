"""Checkpoints of SPOT's source: teachers, students and its DINOSAUR, with their autoregressive transformer decoder.

A student's slots are found in tokens of a ViT whose last blocks were trained further. What it reconstructs, and its
decoder reads, are tokens of the ViT as it was. A checkpoint holds both ViTs.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from featcache.errors import IncompatibleError
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.imported.published import Published
from slotlab.imported.source import BLOCK, Derived, Rule, Source

GROUP, ATTEND, BLOCKS = "slot_attn", "slot_attn.slot_attention", "dec.blocks."
BACKBONE, TARGET = "encoder.", "second_encoder."  # the ViT whose tokens slots read; the one whose are reconstructed
SCANS = [0, 1, 3, 2, 7, 6, 5, 4, 8]  # of each of our scans, the place among SPOT's
QKV = ("query", "key", "value")
LAST = "block12"  # no final norm there: --encoder_final_norm is off


def _derive(published: Published) -> Derived:
    shape = published.shape
    slot_dim, dim = shape(f"{ATTEND}.project_k.weight")
    if not (layers := published.blocks(BLOCKS)):
        raise IncompatibleError(f"{published.path}: its decoder is no transformer, the only one that is known")
    orders = shape("bos_tokens")[0]
    if orders not in (1, len(SCANS)):
        raise IncompatibleError(f"{published.path}: {orders} orders of the patches, and 1 or {len(SCANS)} are known")
    values: dict[str, Any] = {
        "data.tap": LAST,
        "model.slot_dim": slot_dim,
        "model.projection": "wide",
        "model.iterations": 3,
        "model.slot_mlp_hidden": shape(f"{ATTEND}.mlp.0.weight")[0],
        "model.decoder.kind": "transformer",
        "model.decoder.source": "spot",
        "model.decoder.blocks": layers,
        "model.decoder.heads": 6,
        "model.decoder.permuted": orders > 1,
        "model.decoder.scans": "all" if orders > 1 else "rows",
        "optim.steps": 89_000,
    }
    assumed = ["optim.steps", "data.tap", "model.iterations", "model.decoder.heads"]
    if _of_two_vits(published):
        values |= {"data.tap": BACKBONE + LAST, "data.target": TARGET + LAST}
        assumed.append("data.target")
    if orders > 1:
        assumed.append("model.decoder.scans")
    needed = {}
    if published.has(f"{GROUP}.slots_init."):
        values |= {"model.initializer": "learnt", "model.gradient": "bilevel"}
        values["model.slots"] = shape(f"{GROUP}.slots_init.weight")[0]
        assumed.append("model.gradient")
    else:
        values["model.initializer"] = "gaussian"
        needed["model.slots"] = "7 for COCO, 6 for VOC, 11 for MOVi-C, 24 for MOVi-E"
    patches = shape(f"{BLOCKS}0.self_attn_mask")[0]
    return Derived("spot", values, tuple(assumed), needed, dim, patches)


def _of_two_vits(published: Published) -> bool:
    """Whether it is a student: its two ViTs differ, of which a teacher or DINOSAUR has one, or the same one twice."""
    for name, tensor in published.tensors.items():
        if name.startswith(TARGET):
            trained = published.tensors.get(BACKBONE + name.removeprefix(TARGET))
            if trained is None or not torch.equal(trained, tensor):
                return True
    return False


def _starts(bos_tokens: Tensor) -> Tensor:
    """The start tokens (O, 1, 1, D) in the order of our scans, (O, D)."""
    tokens = bos_tokens.flatten(1)
    return tokens[SCANS] if len(tokens) == len(SCANS) else tokens


def _rules(config: Config) -> list[Rule]:
    assert isinstance(config.model, SlotAttentionConfig)
    rules = [
        Rule(f"{GROUP}.layer_norm", ("project.0",)),
        Rule(f"{GROUP}.mlp.0", ("project.1",)),
        Rule(f"{GROUP}.mlp.2", ("project.3",)),
        Rule(f"{GROUP}.slot_mu", ("recur.initialize.mean",)),
        Rule(f"{GROUP}.slot_log_sigma", ("recur.initialize.log_std",)),
        Rule(f"{GROUP}.slots_init.weight", ("recur.initialize.queries",)),
        Rule(f"{ATTEND}.norm_inputs", ("recur.attend.norm_inputs",)),
        Rule(f"{ATTEND}.norm_slots", ("recur.attend.norm_slots",)),
        *(Rule(f"{ATTEND}.project_{part[0]}", (f"recur.attend.to_{part}",)) for part in QKV),
        Rule(f"{ATTEND}.gru", ("recur.attend.gru",)),
        Rule(f"{ATTEND}.norm_mlp", ("recur.attend.mlp.0",)),
        Rule(f"{ATTEND}.mlp.0", ("recur.attend.mlp.1",)),
        Rule(f"{ATTEND}.mlp.2", ("recur.attend.mlp.3",)),
        Rule("bos_tokens", ("decode.begin",), _starts),
        Rule(f"input_proj.{BLOCK}", (f"decode.embed.{BLOCK}",)),
        Rule(f"slot_proj.{BLOCK}", (f"decode.norm_slots.{BLOCK}",)),
        Rule("dec.layer_norm", ("decode.norm",)),
        Rule(f"{BLOCKS}{BLOCK}.self_attn_mask", ()),
    ]
    last = config.model.decoder.blocks - 1
    for index in range(last + 1):
        theirs, ours = f"{BLOCKS}{index}", "decode.last" if index == last else f"decode.blocks.{index}"
        for own, name in (("past", "self_attn"), ("slots", "encoder_decoder_attn")):
            rules.append(Rule(f"{theirs}.{name}_layer_norm", (f"{ours}.norm_{own}",)))
            rules.append(Rule(f"{theirs}.{name}.proj_o", (f"{ours}.to_{own}.out",)))
            rules += (Rule(f"{theirs}.{name}.proj_{part[0]}", (f"{ours}.to_{own}.to_{part}",)) for part in QKV)
        for place, name in ((0, "ffn_layer_norm"), (1, "ffn.0"), (3, "ffn.2")):
            rules.append(Rule(f"{theirs}.{name}", (f"{ours}.feed_forward.layers.{place}",)))
    return rules


def _spelling(name: str) -> str:
    """A name of a tensor; early checkpoints call the decoder otherwise."""
    return re.sub(r"^tf_dec\.", "dec.", name)


SPOT = Source("spot", "gkakogeorgiou/spot 13c5926", _derive, _rules, BACKBONE, others=(TARGET,), spelling=_spelling)
