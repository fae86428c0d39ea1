"""Checkpoints in the layouts of public sources, small and random, and what these models compute, from their papers.

Names and shapes are those that the sources' own code saves; the sums are written out here, by these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

S, K, HIDDEN, HEADS = 8, 3, 16, 4  # width and number of slots, width of hidden layers, heads of every attention

Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def tensors(shapes: Shapes) -> dict[str, Tensor]:
    """Random values: nothing is zero or one, so that each tensor counts."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.4 * torch.randn(shape, generator=generator) + (1 if "norm" in name and "weight" in name else 0)
        for name, shape in shapes.items()
    }


def layer(name: str, inside: int, outside: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outside, inside)} | ({f"{name}.bias": (outside,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def gru(name: str) -> Shapes:
    found: Shapes = {f"{name}.weight_{kind}": (3 * S, S) for kind in ("ih", "hh")}
    return found | {f"{name}.bias_{kind}": (3 * S,) for kind in ("ih", "hh")}


def mlp(name: str, *widths: int) -> Shapes:
    found: Shapes = {}
    for index, (inside, outside) in enumerate(pairwise(widths)):
        found |= layer(f"{name}.{2 * index}", inside, outside)
    return found


def normed_mlp(name: str, inside: int, hidden: int, outside: int) -> Shapes:
    return norm(f"{name}.0", inside) | layer(f"{name}.1", inside, hidden) | layer(f"{name}.3", hidden, outside)


def block(name: str) -> Shapes:
    found = norm(f"{name}.norm1", S) | norm(f"{name}.norm2", S) | layer(f"{name}.self_attn.qkv", S, 3 * S)
    found |= layer(f"{name}.self_attn.out_proj", S, S)
    return found | layer(f"{name}.linear1", S, 4 * S) | layer(f"{name}.linear2", 4 * S, S)


def martius(dim: int, patches: int, *, video: bool, mixer: bool, learnt: bool, outputs: int | None = None) -> Shapes:
    """A model of VideoSAUR's source, or of SlotContrast's; ``outputs``: values that it decodes at a patch."""
    m = ".module" if video else ""
    enc, group, dec = f"encoder{m}.output_transform.layers", f"processor{m}.corrector", f"decoder{m}"
    found: Shapes = {"initializer.slots": (1, K, S)}
    if not learnt:
        found = {"initializer.mean": (1, 1, S), "initializer.log_std": (1, 1, S)}
    found |= normed_mlp(enc, dim, HIDDEN, S) | gru(f"{group}.gru")
    found |= norm(f"{group}.norm_features", S) | norm(f"{group}.norm_slots", S)
    for name in ("to_q", "to_k", "to_v"):
        found |= layer(f"{group}.{name}", S, S, bias=False)
    if not mixer:
        found |= normed_mlp(f"{group}.mlp.layers", S, HIDDEN, S)
    if video:
        found |= block(f"processor{m}.predictor.blocks.0")
    outputs = dim if outputs is None else outputs
    if not mixer:
        mlp_of = mlp(f"{dec}.mlp.layers", S, HIDDEN, HIDDEN, outputs + 1)
        return found | {f"{dec}.pos_emb": (1, 1, patches, S)} | mlp_of
    found |= {f"{dec}.pos_emb": (1, patches, S)}
    for index in range(2):
        found |= block(f"{dec}.allocator.blocks.{index}")
    for name in ("norm_k", "norm_q", "norm_memory"):
        found |= norm(f"{dec}.{name}", S)
    for name in ("to_q", "to_k"):
        found |= layer(f"{dec}.{name}", S, S, bias=False)
    found |= mlp(f"{dec}.renderer.layers", S, HIDDEN, HIDDEN)
    return found | layer(f"{dec}.output_transform", HIDDEN, outputs)


def oclf(dim: int, patches: int) -> Shapes:
    group, dec = "models.perceptual_grouping", "models.object_decoder"
    found: Shapes = {f"models.conditioning.slots_{name}": (1, 1, S) for name in ("mu", "logsigma")}
    found |= normed_mlp(f"{group}.positional_embedding.layers.1", dim, HIDDEN, S)
    found |= gru(f"{group}.slot_attention.gru")
    found |= norm(f"{group}.slot_attention.norm_input", S) | norm(f"{group}.slot_attention.norm_slots", S)
    for name in ("to_q", "to_k", "to_v"):
        found |= layer(f"{group}.slot_attention.{name}", S, S, bias=False)
    found |= normed_mlp(f"{group}.slot_attention.ff_mlp.module", S, HIDDEN, S)
    return found | {f"{dec}.pos_embed": (1, patches, S)} | mlp(f"{dec}.decoder", S, HIDDEN, HIDDEN, dim + 1)


def spot(dim: int, patches: int, *, learnt: bool, orders: int) -> Shapes:
    """A model of SPOT's source: two blocks."""
    group = "slot_attn.slot_attention"
    found: Shapes = {"slot_attn.slots_init.weight": (K, S)}
    if not learnt:
        found = {"slot_attn.slot_mu": (1, 1, S), "slot_attn.slot_log_sigma": (1, 1, S)}
    found |= norm("slot_attn.layer_norm", dim) | mlp("slot_attn.mlp", dim, dim, dim) | gru(f"{group}.gru")
    found |= norm(f"{group}.norm_inputs", dim) | norm(f"{group}.norm_slots", S) | norm(f"{group}.norm_mlp", S)
    for name, inside in (("q", S), ("k", dim), ("v", dim)):
        found |= layer(f"{group}.project_{name}", inside, S, bias=False)
    found |= mlp(f"{group}.mlp", S, HIDDEN, S) | {"bos_tokens": (orders, 1, 1, dim)}
    found |= layer("input_proj.0", dim, dim, bias=False) | norm("input_proj.1", dim)
    found |= layer("slot_proj.0", S, dim, bias=False) | norm("slot_proj.1", dim) | norm("dec.layer_norm", dim)
    for index in range(2):
        of = f"dec.blocks.{index}"
        found |= {f"{of}.self_attn_mask": (patches, patches)} | mlp(f"{of}.ffn", dim, 4 * dim, dim)
        for name in ("self_attn", "encoder_decoder_attn"):
            found |= norm(f"{of}.{name}_layer_norm", dim)
            for part in ("q", "k", "v", "o"):
                found |= layer(f"{of}.{name}.proj_{part}", dim, dim, bias=False)
        found |= norm(f"{of}.ffn_layer_norm", dim)
    return found


def scans(side: int) -> list[list[int]]:
    """The nine orders of SPOT's paper, in the order of its source; the last is the spiral."""
    up, down = range(side), range(side - 1, -1, -1)
    found = []
    for rows, columns in ((up, up), (up, down), (down, down), (down, up)):
        found.append([r * side + c for r in rows for c in columns])
        found.append([r * side + c for c in columns for r in rows])
    left_top, top_left, right_top, top_right, right_bottom, bottom_right, left_bottom, bottom_left = found
    row, column, turn, spiral = 0, side - 1, 0, []  # inwards, down the right side first
    steps = [(1, 0), (0, -1), (-1, 0), (0, 1)]
    while len(spiral) < side**2:
        spiral.append(row * side + column)
        ahead = (row + steps[turn][0], column + steps[turn][1])
        if not (min(ahead) >= 0 and max(ahead) < side) or ahead[0] * side + ahead[1] in spiral:
            turn = (turn + 1) % 4
        row, column = row + steps[turn][0], column + steps[turn][1]
    return [
        *(left_top, top_left, top_right, right_top, bottom_right, right_bottom, bottom_left, left_bottom),
        spiral[::-1],
    ]


class Sums:
    """What layers compute, by the names of their tensors."""

    def __init__(self, of: Tensors) -> None:
        self.of = of

    def layer(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.of[f"{name}.weight"], self.of.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.of[f"{name}.weight"], self.of[f"{name}.bias"])

    def mlp(self, name: str, x: Tensor, layers: int) -> Tensor:
        for index in range(layers):
            x = self.layer(f"{name}.{2 * index}", x.relu() if index else x)
        return x

    def normed_mlp(self, name: str, x: Tensor) -> Tensor:
        return self.layer(f"{name}.3", self.layer(f"{name}.1", self.norm(f"{name}.0", x)).relu())

    def gru(self, name: str, x: Tensor, hidden: Tensor) -> Tensor:
        """By the equations of Cho et al. (2014), as torch documents them."""
        given, before = (
            (y @ self.of[f"{name}.weight_{kind}"].T + self.of[f"{name}.bias_{kind}"]).chunk(3, -1)
            for y, kind in ((x, "ih"), (hidden, "hh"))
        )
        reset, update = ((given[i] + before[i]).sigmoid() for i in (0, 1))
        return (1 - update) * (given[2] + reset * before[2]).tanh() + update * hidden

    def block(self, name: str, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """A pre-norm block whose queries are divided by the scale: logits are ``sqrt(head width)`` times q . k."""
        query = self.norm(f"{name}.norm1", x)
        memory = query if memory is None else memory
        rows = torch.chunk(self.of[f"{name}.self_attn.qkv.weight"], 3)
        biases = torch.chunk(self.of[f"{name}.self_attn.qkv.bias"], 3)
        q, k, v = (
            F.linear(y, w, b).unflatten(-1, (HEADS, -1)).movedim(-2, 0)
            for y, w, b in zip((query, memory, memory), rows, biases, strict=True)
        )
        attended = (q @ k.mT * q.shape[-1] ** 0.5).softmax(-1) @ v  # (heads, M, S / heads)
        x = x + self.layer(f"{name}.self_attn.out_proj", attended.movedim(0, -2).flatten(-2))
        return x + self.layer(f"{name}.linear2", self.layer(f"{name}.linear1", self.norm(f"{name}.norm2", x)).relu())

    def slot_attention(
        self, name: str, tokens: Tensor, slots: Tensor, rounds: int, *, normalised: bool, norm: str, mlp: str
    ) -> tuple[Tensor, Tensor]:
        """Slots and attention (K, N); ``normalised``: the GRU starts from the slots after their LayerNorm."""
        tokens, attention = self.norm(f"{name}.{norm}", tokens), tokens
        for _ in range(rounds):
            normed = self.norm(f"{name}.norm_slots", slots)
            logits = self.layer(f"{name}.to_q", normed) @ self.layer(f"{name}.to_k", tokens).mT * S**-0.5
            attention = logits.softmax(0)
            weights = attention + 1e-8
            updates = weights / weights.sum(-1, keepdim=True) @ self.layer(f"{name}.to_v", tokens)
            slots = self.gru(f"{name}.gru", updates, normed if normalised else slots)
            if f"{name}.{mlp}.1.weight" in self.of:
                slots = slots + self.normed_mlp(f"{name}.{mlp}", slots)
        return slots, attention

    def broadcast(self, name: str, slots: Tensor, position: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """Values and masks (K, N) of the MLP broadcast decoder."""
        decoded = self.mlp(name, slots[:, None] + position.flatten(0, -3), layers)  # (K, N, D + 1)
        masks = decoded[..., -1].softmax(0)
        return (masks[..., None] * decoded[..., :-1]).sum(0), masks

    def martius(self, frames: Tensor, first: Tensor, *, video: bool, mixer: bool) -> list[tuple[Tensor, ...]]:
        """Slots, attention, masks and decoded values of frames (T, N, D), from the first slots (K, S)."""
        m, slots, found = ".module" if video else "", first, []
        for t, frame in enumerate(frames):
            if not video:
                slots = first
            elif t:
                slots = self.block(f"processor{m}.predictor.blocks.0", slots)
            tokens = self.normed_mlp(f"encoder{m}.output_transform.layers", frame)
            slots, attention = self.slot_attention(
                f"processor{m}.corrector", tokens, slots, 2 if t and video else 3,
                normalised=True, norm="norm_features", mlp="mlp.layers",
            )  # fmt: skip
            position, dec = self.of[f"decoder{m}.pos_emb"], f"decoder{m}"
            if mixer:
                query, memory = position[0], self.norm(f"{dec}.norm_memory", slots)
                for index in range(2):
                    query = self.block(f"{dec}.allocator.blocks.{index}", query, memory)
                query = self.layer(f"{dec}.to_q", self.norm(f"{dec}.norm_q", query))
                key = self.layer(f"{dec}.to_k", self.norm(f"{dec}.norm_k", slots))
                masks = (key @ query.mT * S**-0.5).softmax(0)
                hidden = self.mlp(f"{dec}.renderer.layers", masks.mT @ slots + position[0], 2).relu()
                decoded = self.layer(f"{dec}.output_transform", hidden)
            else:
                decoded, masks = self.broadcast(f"{dec}.mlp.layers", slots, position, 3)
            found.append((slots, attention, masks, decoded))
        return found

    def oclf(self, frames: Tensor, first: Tensor) -> list[tuple[Tensor, ...]]:
        group, dec, found = "models.perceptual_grouping", "models.object_decoder", []
        for frame in frames:
            tokens = self.normed_mlp(f"{group}.positional_embedding.layers.1", frame)
            slots, attention = self.slot_attention(
                f"{group}.slot_attention", tokens, first, 3, normalised=False, norm="norm_input", mlp="ff_mlp.module"
            )
            decoded, masks = self.broadcast(f"{dec}.decoder", slots, self.of[f"{dec}.pos_embed"], 3)
            found.append((slots, attention, masks, decoded))
        return found

    def attend(self, name: str, x: Tensor, memory: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Attended tokens, and the weights' mean over the heads (K, N), of SPOT's decoder."""
        q, k, v = (
            self.layer(f"{name}.proj_{part}", y).unflatten(-1, (HEADS, -1)).movedim(-2, 0)
            for part, y in (("q", x), ("k", memory), ("v", memory))
        )
        logits = q @ k.mT * q.shape[-1] ** -0.5  # (heads, N, M)
        if causal:
            logits = logits + torch.full(logits.shape[1:], -torch.inf).triu(1)
        weights = logits.softmax(-1)
        return self.layer(f"{name}.proj_o", (weights @ v).movedim(0, -2).flatten(-2)), weights.mean(0).mT

    def spot(
        self, frames: Tensor, first: Tensor, orders: int, targets: Tensor | None = None
    ) -> list[tuple[Tensor, ...]]:
        """The means over that many orders of the patches. ``targets``: a student's, tokens of its other ViT."""
        group, found = "slot_attn.slot_attention", []
        spelled = {"project_": "to_", "mlp.0": "ff.1", "mlp.2": "ff.3", "norm_mlp": "ff.0"}
        named = {name.removeprefix(f"{group}."): value for name, value in self.of.items() if name.startswith(group)}
        for theirs, ours in spelled.items():
            named = {name.replace(theirs, ours, 1): value for name, value in named.items()}
        grouped = Sums({f"{group}.{name}": value for name, value in named.items()})
        for frame, target in zip(frames, frames if targets is None else targets, strict=True):
            tokens = self.mlp("slot_attn.mlp", self.norm("slot_attn.layer_norm", frame), 2)
            slots, attention = grouped.slot_attention(
                group, tokens, first, 3, normalised=False, norm="norm_inputs", mlp="ff"
            )
            memory = self.norm("slot_proj.1", self.layer("slot_proj.0", slots))
            passes = []
            for order, begin in zip(scans(round(len(frame) ** 0.5))[:orders], self.of["bos_tokens"], strict=True):
                x = torch.cat([begin[0], target[order][:-1]])
                x, masks = self.norm("input_proj.1", self.layer("input_proj.0", x)), attention
                for index in range(2):
                    of = f"dec.blocks.{index}"
                    normed = self.norm(f"{of}.self_attn_layer_norm", x)
                    x = (x if index else normed) + self.attend(f"{of}.self_attn", normed, normed, causal=True)[0]
                    normed = self.norm(f"{of}.encoder_decoder_attn_layer_norm", x)
                    moved, masks = self.attend(f"{of}.encoder_decoder_attn", normed, memory, causal=False)
                    x = x + moved
                    x = x + self.mlp(f"{of}.ffn", self.norm(f"{of}.ffn_layer_norm", x), 2)
                back = torch.tensor(order).argsort()
                passes.append((masks[:, back], self.norm("dec.layer_norm", x)[back]))
            mean = [torch.stack(parts).mean(0) for parts in zip(*passes, strict=True)]
            found.append((slots, attention, *mean))
        return found
