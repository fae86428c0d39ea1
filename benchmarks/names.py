"""What our parameters are called in the public sources: the tables of ``import-run``, and what it does not import."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from slotlab.config.model import SlotAttentionConfig
from slotlab.config.schema import Config
from slotlab.imported.oclf import OCLF
from slotlab.imported.source import BLOCK, Rule, targets_of
from slotlab.imported.spot import SPOT
from slotlab.imported.videosaur import SLOTCONTRAST, VIDEOSAUR

QKV = ("query", "key", "value")


class Names(NamedTuple):
    """A source's table, and how the names of :mod:`benchmarks.sources` are spelled there."""

    rules: Callable[[Config], Sequence[Rule]]
    spelling: Callable[[str], str] = str


def parts(names: Names, config: Config, theirs: dict[str, Tensor], ours: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of ours that the source has, by its name: the rows of theirs that it is."""
    here, rules = dict(ours.named_parameters()), names.rules(config)
    for name, tensor in theirs.items():
        targets = [target for target in targets_of(rules, names.spelling(name))[1] if target in here]
        used = [target for target in targets if here[target].requires_grad]
        start = 0
        for target in used:
            rows = len(tensor) if len(used) == 1 else len(here[target])
            yield target, tensor[start : start + rows]
            start += rows


def decoder_of(config: Config) -> SlotAttentionConfig:
    assert isinstance(config.model, SlotAttentionConfig)
    return config.model


def causal_blocks(config: Config) -> Iterator[tuple[int, str]]:
    """The blocks of an autoregressive decoder by their numbers, ours."""
    last = decoder_of(config).decoder.blocks - 1
    for index in range(last + 1):
        yield index, "decode.last" if index == last else f"decode.blocks.{index}"


def feed_forward(ours: str, norm: str, first: str, second: str) -> Iterator[Rule]:
    for index, theirs in ((0, norm), (1, first), (3, second)):
        yield Rule(theirs, (f"{ours}.feed_forward.layers.{index}",))


def oclf(config: Config) -> list[Rule]:
    """The framework of DINOSAUR, its autoregressive decoder too, which is torch's."""
    if decoder_of(config).decoder.kind == "mlp":
        return list(OCLF.rules(config))
    decoder = "models.object_decoder"
    rules = [rule for rule in OCLF.rules(config) if not rule.theirs.startswith(decoder)]
    rules += [
        Rule(f"{decoder}.bos_token", ("decode.begin",)),
        Rule(f"{decoder}.inp_transform.{BLOCK}", (f"decode.embed.{BLOCK}",)),
        Rule(f"{decoder}.cond_transform.{BLOCK}", (f"decode.norm_slots.{BLOCK}",)),
    ]
    for index, ours in causal_blocks(config):
        rules += torch_block(f"{decoder}.decoder.layers.{index}", ours)
    return rules


def torch_block(theirs: str, ours: str) -> Iterator[Rule]:
    """A ``nn.TransformerDecoderLayer``."""
    yield Rule(f"{theirs}.norm1", (f"{ours}.norm_past",))
    yield Rule(f"{theirs}.norm2", (f"{ours}.norm_slots",))
    for own, name in (("to_past", "self_attn"), ("to_slots", "multihead_attn")):
        for kind in ("weight", "bias"):
            yield Rule(f"{theirs}.{name}.in_proj_{kind}", tuple(f"{ours}.{own}.to_{part}.{kind}" for part in QKV))
        yield Rule(f"{theirs}.{name}.out_proj", (f"{ours}.{own}.out",))
    yield from feed_forward(ours, f"{theirs}.norm3", f"{theirs}.linear1", f"{theirs}.linear2")


def oclf_spelling(name: str) -> str:
    """A name of our :func:`benchmarks.sources.dinosaur`, which puts its parts together without Hydra."""
    return f"models.{name}".replace("models.project.", "models.perceptual_grouping.positional_embedding.layers.1.")


NAMES: dict[str, Names] = {
    "videosaur": Names(VIDEOSAUR.rules, VIDEOSAUR.spelling),
    "slotcontrast": Names(SLOTCONTRAST.rules, SLOTCONTRAST.spelling),
    "ocl": Names(oclf, oclf_spelling),
    "spot.py": Names(SPOT.rules, SPOT.spelling),
}
