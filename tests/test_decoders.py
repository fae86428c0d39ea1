"""Decoders: exact identities, what each may see, and what they draw in training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.names import torch_block
from featcache.errors import UsageError
from slotlab.config.model import SlotAttentionConfig
from slotlab.config.parts import DecoderConfig
from slotlab.imported.source import targets_of
from slotlab.models.decoders import DECODERS, broadcast
from slotlab.models.decoders.autoregressive import TransformerDecoder, scan_orders, spiral
from slotlab.models.decoders.base import Decoded, Decoder, Sizes
from slotlab.models.decoders.broadcast import MLPDecoder
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws, Share
from slotlab.models.slot_attention import Attended
from slotlab.models.slot_model import SlotModel
from slotlab.models.transformer import Attention
from slotlab.training.cost import Tally

B, N, K, S, D = 3, 16, 5, 8, 12
GRID = (4, 4)
INDEPENDENT = ["mlp", "mix", "slot_mixer"]  # decode each patch by itself


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attended(active: Tensor | None = None) -> Attended:
    logits = draw(B, K, N, seed=1)
    return Attended(draw(B, K, S), logits.softmax(1), logits, active)


def build(kind: str, *, similarity: bool = False, **options: Any) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig.model_validate({"kind": kind, "hidden": 16, "layers": 3, **options})
    return DECODERS[kind](Sizes(S, GRID, D, similarity=similarity), config)


def decode(decoder: Decoder, given: Attended | None = None, seed: int = 0) -> Decoded:
    decoded: Decoded = decoder(given or attended(), draw(B, N, D, seed=5), Draws(seed))
    return decoded


def published_mlp_decoder(decoder: MLPDecoder, slots: Tensor) -> tuple[Tensor, Tensor]:
    """DINOSAUR's decoder as published: every layer on every slot at every patch, then the average."""
    x = slots[:, :, None] + decoder.position  # (B, K, N, S)
    hidden = decoder.hidden(decoder.first(x))  # (B, K, N, H)
    masks = (decoder.mask(hidden) / decoder.config.mask_temperature).softmax(1)  # (B, K, N, 1)
    return (masks * decoder.heads.tokens(hidden)).sum(1), masks[..., 0]


def test_a_compiled_mlp_decoder_takes_no_more_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One activation of all patches of a large batch is gigabytes; a compiler unrolls as few turns as memory allows."""
    decoder, rows = build("mlp").train(), []
    assert isinstance(decoder, MLPDecoder)
    expected = decode(decoder)
    decoder.mask.register_forward_hook(lambda module, given, made: rows.append(made.numel()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(broadcast, "ROWS_COMPILED", 3 * B * K)
    found = decode(decoder)
    assert rows == [4 * B * K] * 4, "equal turns, about as many rows as were set"
    torch.testing.assert_close(found.reconstruction, expected.reconstruction, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.masks, expected.masks, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rows", [3 * B * K, 1 << 11])  # patches in several goes, the last one shorter; in one
def test_mlp_decoder_equals_the_published_one(
    monkeypatch: pytest.MonkeyPatch, layers: int, recompute: bool, rows: int
) -> None:
    monkeypatch.setattr("slotlab.models.decoders.broadcast.ROWS_ON_CPU", rows)
    decoder = build("mlp", layers=layers, recompute=recompute, mask_temperature=0.5).double()
    assert isinstance(decoder, MLPDecoder)
    given = attended()
    slots = given.slots.double().requires_grad_()
    expected, masks = published_mlp_decoder(decoder, slots)
    decoded = decoder(replace(given, slots=slots), draw(B, N, D).double(), Draws(0))
    torch.testing.assert_close(decoded.reconstruction, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoded.masks.double(), masks, rtol=1e-5, atol=1e-6)
    weights = draw(B, N, D, seed=2).double()
    parameters = [slots, *decoder.parameters()]
    ours = torch.autograd.grad((decoded.reconstruction * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masks", ["soft", "straight_through", "gumbel"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_by_hand_is_autograd_s(
    monkeypatch: pytest.MonkeyPatch, masks: str, layers: int, recompute: bool
) -> None:
    """As a compiler gets it, in portions of which the last is shorter, with padding, frozen layers and losses on both
    results or one."""
    monkeypatch.setattr("slotlab.models.decoders.broadcast.ROWS_ON_CPU", 5 * B * K)
    active = torch.arange(K).expand(B, -1) < torch.tensor([[5], [3], [4]])
    decoder = build("mlp", layers=layers, recompute=recompute, masks=masks).double().train()
    assert isinstance(decoder, MLPDecoder)
    decoder.mask.bias.requires_grad_(False)
    slots = attended().slots.double().requires_grad_()
    wanted = [slots, *(p for p in decoder.parameters() if p.requires_grad)]

    def found(on_tokens: float, on_masks: float) -> list[Tensor]:
        decoded = decoder(replace(attended(active), slots=slots), draw(B, N, D).double(), Draws(0))
        losses = [(decoded.reconstruction * draw(B, N, D, seed=2)).sum(), (decoded.masks * draw(B, K, N, seed=3)).sum()]
        loss = sum(weight * loss for weight, loss in zip((on_tokens, on_masks), losses, strict=True) if weight)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
        return [decoded.reconstruction, decoded.masks, *gradients]

    for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        ours = found(*weights)
        with monkeypatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.testing.assert_close(ours, found(*weights), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_further_portion_adds_no_sum_of_weights() -> None:
    """Of three layers: 7 operations there and 25 back. Products add to the gradients of weights by themselves."""

    def operations(portions: int) -> int:
        tally = Tally()
        with FakeTensorMode(), tally:
            decoder = build("mlp")
            assert isinstance(decoder, MLPDecoder)
            decoder.rows = B * K * N // portions
            tally.restart()
            decode(decoder).reconstruction.sum().backward()
        return tally.cost(0, 0).operations

    assert [operations(2 * n) - operations(n) for n in (2, 4)] == [2 * 32, 4 * 32]


def kept_values(decoder: Decoder) -> int:
    """Values that the backward pass finds kept, parameters left out."""
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in decoder.parameters()}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        decoded = decode(decoder)
    assert decoded.reconstruction.requires_grad
    return sum(kept.values())


def test_mlp_decoder_keeps_few_activations() -> None:
    width = 64
    rows = B * K * N * width
    assert 2 * rows <= kept_values(build("mlp", hidden=width)) < 2.5 * rows  # of three layers
    assert kept_values(build("mlp", hidden=width, recompute=True)) < 0.5 * rows


def test_spatial_broadcast_keeps_no_activations_if_it_computes_them_again() -> None:
    width = 64
    rows = B * K * N * width
    assert kept_values(build("spatial_broadcast", hidden=width)) > 3 * rows  # of three layers
    assert kept_values(build("spatial_broadcast", hidden=width, recompute=True)) < 0.5 * rows


@pytest.mark.parametrize("kind", list(DECODERS))
def test_masks_share_out_every_patch(kind: str) -> None:
    decoded = decode(build(kind, similarity=True))
    assert decoded.reconstruction.shape == (B, N, D)
    assert decoded.similarity is not None and decoded.similarity.shape == (B, N, N)
    torch.testing.assert_close(decoded.masks.sum(1), torch.ones(B, N))
    assert decode(build(kind)).similarity is None


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "mix"])  # whose masks are its input
def test_decoders_do_not_see_padded_slots(kind: str) -> None:
    active = torch.ones(B, K, dtype=torch.bool)
    active[:, -1] = False
    decoder = build(kind).eval()
    given = attended(active)
    other = replace(given, slots=torch.cat([given.slots[:, :-1], 9 * draw(B, 1, S, seed=3)], 1))
    one, two = decode(decoder, given), decode(decoder, other)
    torch.testing.assert_close(one.reconstruction, two.reconstruction)
    assert not bool(one.masks[:, -1].any())


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_a_subset_of_patches_is_decoded_as_among_all(kind: str) -> None:
    decoder = build(kind, patches=6, similarity=True)
    some, every = decode(decoder), decode(decoder.eval())
    assert some.positions is not None and every.positions is None and len(some.positions) == 6
    torch.testing.assert_close(some.reconstruction, every.reconstruction[:, some.positions])
    torch.testing.assert_close(some.masks, every.masks[..., some.positions])
    assert some.similarity is not None and every.similarity is not None
    torch.testing.assert_close(some.similarity, every.similarity[:, some.positions])
    decoder.train()
    drawn = [decode(decoder, seed=seed).positions for seed in range(40)]
    assert len(torch.cat([p for p in drawn if p is not None]).unique()) == N, "every patch has its turn"


@pytest.mark.parametrize("masks", ["gumbel", "straight_through"])
def test_hard_masks_in_training_have_soft_gradients(masks: str) -> None:
    decoder = build("mlp", masks=masks)
    given = attended()
    slots = given.slots.clone().requires_grad_()
    hard = decode(decoder, replace(given, slots=slots)).masks
    assert bool(((hard.detach() - hard.detach().round()).abs() < 1e-6).all())
    (gradient,) = torch.autograd.grad((hard * draw(B, K, N, seed=7)).sum(), slots)
    assert float(gradient.abs().max()) > 0
    soft = decode(decoder.eval()).masks
    assert float(soft.detach().amax(1).min()) < 1
    agrees = (hard.argmax(1) == soft.argmax(1)).float().mean()
    assert agrees == 1 if masks == "straight_through" else agrees < 1


def test_gumbel_masks_are_drawn_in_proportion_to_the_soft_ones() -> None:
    decoder = build("mlp", masks="gumbel")
    drawn = torch.stack([decode(decoder, seed=seed).masks.detach() for seed in range(400)]).mean(0)
    torch.testing.assert_close(drawn, decode(decoder.eval()).masks.detach(), atol=0.12, rtol=0)


def test_draws_do_not_depend_on_how_a_batch_is_split() -> None:
    decoder = build("mlp", masks="gumbel")
    given, target = attended(), draw(B, N, D, seed=5)
    whole = decode(decoder, given).masks
    for row in range(B):
        own = slice(row, row + 1)
        part = Attended(given.slots[own], given.attention[own], given.logits[own])
        shared = decoder(part, target[own], Draws(0, Share(row, B))).masks
        torch.testing.assert_close(shared, whole[own])


@pytest.mark.parametrize("source", ["slotlab", "dinosaur", "spot", "semantic"])
@pytest.mark.parametrize("permuted", [False, True])
def test_autoregression_sees_only_what_came_before(permuted: bool, source: str) -> None:
    options = {} if source == "slotlab" else {"source": source, "hidden": 256}
    decoder = build("transformer", permuted=permuted, **options)
    given, target = attended(), draw(B, N, D, seed=5)
    order = list(range(N))
    if permuted:
        assert isinstance(decoder, TransformerDecoder)
        order = decoder.orders[Draws(3).integers(len(decoder.orders), 1)[0]].tolist()
        assert order != list(range(N))
    changed = 6  # th patch in the order
    other = target.clone()
    other[:, order[changed]] += 1
    one, two = (decoder(given, tokens, Draws(3)).reconstruction.detach() for tokens in (target, other))
    moved = (one - two).abs().amax((0, 2))[order] > 1e-6
    assert moved.tolist() == [place > changed for place in range(N)]


def test_trained_autoregression_goes_row_by_row() -> None:
    decoder = build("transformer", permuted=True)
    trained = [decode(decoder, seed=seed).reconstruction for seed in range(8)]
    assert any(not torch.allclose(trained[0], other) for other in trained)
    decoder.eval()
    assert torch.equal(decode(decoder, seed=0).reconstruction, decode(decoder, seed=1).reconstruction)


def test_scans_are_permutations_between_neighbours() -> None:
    orders = scan_orders((3, 5))
    assert len({tuple(order.tolist()) for order in orders}) == 8
    assert orders[0].tolist() == list(range(15))
    for order in orders.tolist():
        assert sorted(order) == list(range(15))
        assert abs(order[1] - order[0]) in (1, 5)


def test_the_ninth_scan_of_spot_is_a_spiral_from_the_middle() -> None:
    order = spiral((4, 4))
    steps = (order[1:] - order[:-1]).abs()
    assert sorted(order.tolist()) == list(range(16)) and bool(((steps == 1) | (steps == 4)).all())
    assert sorted(order[:4].tolist()) == [5, 6, 9, 10] and order[-4:].tolist() == [15, 11, 7, 3]
    decoder = build("transformer", source="spot", hidden=256, permuted=True)
    assert isinstance(decoder, TransformerDecoder) and torch.equal(decoder.orders[8], order)


def test_the_transformers_of_the_sources_have_their_layers_and_no_others() -> None:
    """Counted by their own: two blocks of width 12, two heads, 16 patches, slots of 8."""
    block = 4 * 12 * 12 * 2 + 2 * 12 * 48 + 48 + 12 + 6 * 12  # two attentions, the MLP, three LayerNorms
    ends = 12 * 12 + 2 * 12 + 12 * 8 + 2 * 12 + 12  # of tokens and of slots into it, the start token
    biases, positions = 2 * 4 * 12, 16 * 12
    expected = {
        "dinosaur": 2 * (block + biases) + ends,
        "spot": 2 * block + ends + 2 * 12,  # a LayerNorm at the end
        "semantic": 2 * (block + biases) + ends + positions + 12 * 12,
    }
    found = {
        source: sum(p.numel() for p in build("transformer", source=source, hidden=256, heads=2).parameters())
        for source in expected
    }
    assert found == expected


@torch.no_grad()
def test_the_transformer_of_dinosaurs_source_is_torchs() -> None:
    decoder = build("transformer", source="dinosaur", hidden=256, heads=4, blocks=2)
    layer = nn.TransformerDecoderLayer(D, 4, 4 * D, 0.0, batch_first=True, norm_first=True)
    peer = nn.TransformerDecoder(layer, 2)
    for parameter in peer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    here, copied = dict(decoder.named_parameters()), 0
    for index, ours in enumerate(("blocks.0", "last")):
        rules = list(torch_block(f"layers.{index}", ours))
        for name, parameter in peer.named_parameters():
            targets = targets_of(rules, name)[1]
            for target, rows in zip(targets, parameter.chunk(max(1, len(targets))), strict=False):
                here[target].copy_(rows)
                copied += rows.numel()
    assert copied == sum(parameter.numel() for parameter in peer.parameters())
    assert isinstance(decoder, TransformerDecoder)
    given, target = attended(), draw(B, N, D, seed=5)
    before = decoder.embed(torch.cat([decoder.begin.expand(B, 1, -1), target[:, :-1]], 1))
    expected = peer(before, decoder.norm_slots(given.slots), nn.Transformer.generate_square_subsequent_mask(N))
    torch.testing.assert_close(decoder(given, target, Draws(0)).reconstruction, expected)


def test_heads_must_divide_the_features() -> None:
    with pytest.raises(UsageError, match="heads = 5 do not divide the features' width of 12"):
        build("transformer", source="spot", hidden=256, heads=5)


def test_attention_with_weights_is_the_same_attention() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 4, memory_dim=S)
    tokens, memory = draw(B, N, 16), draw(B, K, S)
    active = torch.rand(B, K, generator=torch.Generator().manual_seed(1)) < 0.8
    active[:, 0] = True
    mixed, weights = attention.with_weights(tokens, memory, active)
    torch.testing.assert_close(mixed, attention(tokens, memory, active=active))
    torch.testing.assert_close(weights.sum(1), torch.ones(B, N))
    peer = torch.nn.MultiheadAttention(16, 4, kdim=S, vdim=S, batch_first=True)
    parts = (attention.to_query, attention.to_key, attention.to_value)
    with torch.no_grad():
        for name, part in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), parts, strict=True):
            getattr(peer, name).copy_(part.weight)
        peer.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        peer.out_proj.load_state_dict(attention.out.state_dict())
    expected, seen = peer(tokens, memory, memory, key_padding_mask=~active)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(weights, seen.transpose(1, 2))


@pytest.mark.parametrize("kind", list(DECODERS))
@pytest.mark.parametrize("options", [{}, {"masks": "gumbel", "recompute": True}])
def test_bfloat16_is_close(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    decoder = {"kind": kind, "hidden": 32, **options}
    config = SlotAttentionConfig.model_validate({"slots": K, "slot_dim": S, "decoder": decoder, "iterations": 2})
    model = SlotModel(config, Normaliser("none", D), GRID, similarity=True)
    features = draw(B, N, D)
    exact = model(features, Draws(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(features, Draws(0))
    assert rounded.masks.dtype == rounded.attention.dtype == torch.float32
    assert rounded.reconstruction.dtype == torch.bfloat16
    if not options:
        torch.testing.assert_close(rounded.masks, exact.masks, atol=0.05, rtol=0)
        torch.testing.assert_close(rounded.reconstruction.float(), exact.reconstruction, atol=0.1, rtol=0)
    rounded.reconstruction.float().square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "similarity" not in n]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)
