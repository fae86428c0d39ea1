"""Checkpoints of VideoSAUR's source, and of SlotContrast's, which has the same modules.

Both keep the normalised slots as the hidden state of the GRU, and divide queries by ``head_dim ** -0.5`` where they
mean to multiply: attention there is ``head_dim`` times as sharp, which is ``attention_temperature`` here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from featcache.errors import IncompatibleError
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.imported.published import Published
from slotlab.imported.source import BLOCK, Derived, Rule, Source, mlp_rules

PROJECT, CORRECT, PREDICT = "encoder.output_transform.layers", "processor.corrector", "processor.predictor.blocks"
HEADS = 4  # of every attention in the configurations of both


def _derive(published: Published, video: str) -> Derived:
    """``video`` is the preset of models of videos; those of images are DINOSAUR."""
    shape = published.shape
    dim, hidden, slot_dim = shape(f"{PROJECT}.0.weight")[0], *shape(f"{PROJECT}.3.weight")[::-1]
    patches = shape("decoder.pos_emb")[-2]
    recurrent = any(name.startswith("processor.module.") for name in published.names.values())
    values: dict[str, Any] = {
        "data.tap": "block12",
        "model.slot_dim": slot_dim,
        "model.projection_hidden": hidden,
        "model.gru_hidden": "normalised",
        "model.iterations": 2 if recurrent else 3,
        "optim.steps": 100_000 if recurrent else 500_000,
        "model.slot_mlp_hidden": shape(f"{CORRECT}.mlp.layers.1.weight")[0] if published.has(f"{CORRECT}.mlp.") else 0,
    }
    assumed, needed = ["optim.steps", "data.tap", "model.iterations"], {}
    if published.has("initializer.slots"):
        values |= {"model.initializer": "learnt", "model.slots": shape("initializer.slots")[1]}
    else:
        values["model.initializer"] = "gaussian"
        needed["model.slots"] = "11 for MOVi-C, 15 for MOVi-E, 7 for YouTube-VIS and COCO"
    if recurrent:
        values["model.predictor.first_iterations"] = 3
        assumed.append("model.predictor.first_iterations")
        if (blocks := published.blocks(f"{PREDICT}.")) > 1:
            raise IncompatibleError(f"{published.path}: a predictor of {blocks} blocks, and ours has one")
        values["model.predictor.kind"] = "transformer" if blocks else "identity"
        if blocks:
            values["model.predictor.hidden"] = shape(f"{PREDICT}.0.linear1.weight")[0]
            values |= {"model.predictor.heads": HEADS, "model.predictor.attention_temperature": HEADS / slot_dim}
            assumed.append("model.predictor.heads")
    if published.has("decoder.mlp."):
        layers = published.blocks("decoder.mlp.layers.") - 1
        values |= {"model.decoder.kind": "mlp", "model.decoder.hidden": shape("decoder.mlp.layers.0.weight")[0]}
        outputs, heads = shape(f"decoder.mlp.layers.{2 * layers}.weight")[0] - 1, "decode.heads"
    elif published.has("decoder.allocator."):
        layers = published.blocks("decoder.renderer.layers.")
        values |= {
            "model.decoder.kind": "slot_mixer",
            "model.decoder.hidden": shape("decoder.renderer.layers.0.weight")[0],
            "model.decoder.blocks": published.blocks("decoder.allocator.blocks."),
            "model.decoder.heads": HEADS,
            "model.decoder.attention_temperature": HEADS / slot_dim,
        }
        assumed.append("model.decoder.heads")
        outputs, heads = shape("decoder.output_transform.weight")[0], "decode.render.heads"
    else:
        raise IncompatibleError(f"{published.path}: its decoder is neither an MLP nor a slot mixer, which are known")
    values["model.decoder.layers"] = layers
    if outputs not in (dim, patches, dim + patches):
        wanted = f"{dim} (tokens), {patches} (similarities) or both"
        raise IncompatibleError(f"{published.path}: its decoder gives {outputs} values a patch, and not {wanted}")
    reconstructs = outputs != patches
    values["loss.feature_mse"] = 1.0 if reconstructs else 0.0
    values["loss.temporal_similarity"] = 0.0 if outputs == dim else 0.1
    absent = () if reconstructs else (f"{heads}.tokens.",)
    return Derived(video if recurrent else "dinosaur", values, tuple(assumed), needed, dim, patches, absent)


def _rules(config: Config) -> list[Rule]:
    assert isinstance(config.model, SlotAttentionConfig)
    predictor, decoder = config.model.predictor, config.model.decoder
    rules = [
        Rule("initializer.mean", ("recur.initialize.mean",)),
        Rule("initializer.log_std", ("recur.initialize.log_std",)),
        Rule("initializer.slots", ("recur.initialize.queries",)),
        Rule(f"{PROJECT}.{BLOCK}", (f"project.{BLOCK}",)),
        Rule(f"{CORRECT}.norm_features", ("recur.attend.norm_inputs",)),
        Rule(f"{CORRECT}.norm_slots", ("recur.attend.norm_slots",)),
        Rule(f"{CORRECT}.to_q", ("recur.attend.to_query",)),
        Rule(f"{CORRECT}.to_k", ("recur.attend.to_key",)),
        Rule(f"{CORRECT}.to_v", ("recur.attend.to_value",)),
        Rule(f"{CORRECT}.gru", ("recur.attend.gru",)),
        Rule(f"{CORRECT}.mlp.layers.{BLOCK}", (f"recur.attend.mlp.{BLOCK}",)),
        Rule("decoder.pos_emb", ("decode.position",)),
    ]
    if predictor is not None:
        rules += _block(f"{PREDICT}.0", "recur.predict.move")
    if decoder.kind == "mlp":
        return [*rules, *mlp_rules("decoder.mlp.layers", decoder.layers)]
    return [
        *rules,
        *_block(f"decoder.allocator.blocks.{BLOCK}", f"decode.blocks.{BLOCK}"),
        Rule("decoder.norm_memory", ("decode.norm_slots",)),
        Rule("decoder.norm_q", ("decode.to_query.0",)),
        Rule("decoder.to_q", ("decode.to_query.1",)),
        Rule("decoder.norm_k", ("decode.to_key.0",)),
        Rule("decoder.to_k", ("decode.to_key.1",)),
        Rule(f"decoder.renderer.layers.{BLOCK}", (f"decode.render.layers.{BLOCK}",)),
        Rule("decoder.output_transform", ("decode.render.heads.tokens", "decode.render.heads.similarity")),
    ]


def _block(theirs: str, ours: str) -> Iterator[Rule]:
    """A block of a transformer."""
    facets = tuple(f"{ours}.attend.to_{facet}" for facet in ("query", "key", "value"))
    yield Rule(f"{theirs}.norm1", (f"{ours}.norm",))
    yield Rule(f"{theirs}.self_attn.qkv", facets)
    yield Rule(f"{theirs}.self_attn.out_proj", (f"{ours}.attend.out",))
    yield Rule(f"{theirs}.norm2", (f"{ours}.feed_forward.layers.0",))
    yield Rule(f"{theirs}.linear1", (f"{ours}.feed_forward.layers.1",))
    yield Rule(f"{theirs}.linear2", (f"{ours}.feed_forward.layers.3",))


def _spelling(name: str) -> str:
    """A name without the wrappers that models of videos have around their parts."""
    return re.sub(r"^(encoder|processor|decoder)\.module\.", r"\1.", name)


VIDEOSAUR = Source(
    "videosaur",
    "martius-lab/videosaur 5d09311",
    partial(_derive, video="videosaur"),
    _rules,
    "encoder.backbone.model.",
    others=("target_encoder.",),  # of the loss alone
    spelling=_spelling,
)
SLOTCONTRAST = replace(
    VIDEOSAUR,
    name="slotcontrast",
    repository="martius-lab/slotcontrast 17b42b0",
    derive=partial(_derive, video="slotcontrast"),
)
