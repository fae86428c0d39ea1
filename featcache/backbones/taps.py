"""Taps, the places in a backbone where tokens are read: ``block9``, ``block12.norm``, ``block12.key``.

A file of weights may hold several ViTs, as those of models do that trained one of two further. Then a tap begins with
what the names of its ViT's parameters begin with: ``encoder.block12`` and ``second_encoder.block12``.
"""

from __future__ import annotations

from dataclasses import dataclass

from featcache.backbones.registry import TAP, BackboneSpec
from featcache.backbones.towers import Tower
from featcache.errors import UsageError

FACETS = ("query", "key", "value")


@dataclass(frozen=True)
class Tap:
    """One parsed tap: its ViT, the index of its block or stage, from 0, and the kind of tensor read there."""

    name: str
    index: int
    kind: str  # "output", "norm" or a facet
    vit: str = ""  # what the names of its parameters begin with; "" for the only one


def parse_tap(text: str, spec: BackboneSpec, tower: Tower) -> Tap:
    """The tap of that name: a block's, or a stage's of a convolutional network. ``UsageError`` if there is none."""
    if tower.blocks:
        tap = parse_block_tap(text, spec)
        if tap.kind == "norm" and tower.norm is None:
            raise UsageError(f"{spec.name} has no final norm of tokens; use block{tap.index + 1}")
        return tap
    stages = [info["module"] for info in tower.model.feature_info]
    if text not in stages:
        raise UsageError(f"{spec.name} has no tap {text!r}; its taps are {', '.join(stages)}")
    return Tap(text, stages.index(text), "output")


def parse_block_tap(text: str, spec: BackboneSpec) -> Tap:
    """The tap ``blockN`` or ``blockN.KIND``, checked without the model. ``UsageError`` if there is none."""
    match = TAP.fullmatch(text)
    if match is None:
        raise UsageError(
            f"no tap {text!r} in {spec.name}; write block1 to block{spec.depth}, blockN.norm|query|key|value"
        )
    block, kind = int(match["block"]), match["kind"] or "output"
    if block > spec.depth:
        raise UsageError(f"{spec.name} has no block {block} (tap {text!r}); its blocks are 1 to {spec.depth}")
    if kind not in ("output", "norm", *FACETS):
        raise UsageError(f"no facet {kind!r} (tap {text!r}); after the block comes .norm, .query, .key or .value")
    return Tap(text, block - 1, kind, match["vit"] or "")


def vit_of(text: str) -> str:
    """What the names of the parameters of a tap's ViT begin with, in a file of several; "" for the only one."""
    match = TAP.fullmatch(text)
    return (match and match["vit"]) or ""
