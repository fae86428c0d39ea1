"""The parts of a slot model: exact identities, invariances, and determinism of their draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from pydantic import ValidationError
from torch import Tensor, nn

from slotlab.config.model import ClusteringConfig, GRUHidden, SlotAttentionConfig
from slotlab.config.schema import LossConfig
from slotlab.models.clustering.model import ClusteringModel, otsu_threshold
from slotlab.models.decoders import DECODERS
from slotlab.models.initializers import INITIALIZERS, Saliency, Starts
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.slot_attention import SlotAttention
from slotlab.models.slot_model import SlotModel
from slotlab.models.transformer import Attention
from slotlab.training.losses import losses, total

B, N, K, S, D = 3, 16, 5, 8, 12
GRID = (4, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_slot_attention_follows_a_permutation_of_the_slots() -> None:
    torch.manual_seed(0)
    module, inputs, slots = SlotAttention(D, S, 16), draw(B, N, D), draw(B, K, S)
    order = torch.randperm(K)
    plain, permuted = module(inputs, slots, 3), module(inputs, slots[:, order], 3)
    torch.testing.assert_close(plain.slots[:, order], permuted.slots)
    torch.testing.assert_close(plain.attention[:, order], permuted.attention)
    torch.testing.assert_close(plain.attention.sum(1), torch.ones(B, N))


def test_slot_attention_ignores_the_order_of_patches() -> None:
    torch.manual_seed(0)
    module, inputs, slots = SlotAttention(D, S, 16), draw(B, N, D), draw(B, K, S)
    order = torch.randperm(N)
    torch.testing.assert_close(module(inputs, slots, 2).slots, module(inputs[:, order], slots, 2).slots)


@pytest.mark.parametrize("hidden", ["slots", "normalised"])
def test_the_gru_starts_from_the_slots_or_from_their_layer_norm(hidden: GRUHidden) -> None:
    """By one round of Locatello et al.'s algorithm 1; VideoSAUR's source normalises the slots in place."""
    torch.manual_seed(0)
    module, inputs, slots = SlotAttention(D, S, 0, gru_hidden=hidden), draw(B, N, D), 3 * draw(B, K, S)
    normed, tokens = module.norm_slots(slots), module.norm_inputs(inputs)
    attention = (module.to_query(normed) @ module.to_key(tokens).mT / S**0.5).softmax(1)
    updates = attention / attention.sum(-1, keepdim=True) @ module.to_value(tokens)
    before = {"slots": slots, "normalised": normed}[hidden]
    for b in range(B):
        expected = nn.GRUCell.forward(module.gru, updates[b], before[b])
        torch.testing.assert_close(module(inputs, slots, 1).slots[b], expected)


def test_low_temperature_sharpens() -> None:
    soft, sharp = (SlotAttention(D, S, 16, temperature=t) for t in (1.0, 0.3))
    sharp.load_state_dict(soft.state_dict())
    inputs, slots = draw(B, N, D), draw(B, K, S)
    assert sharp(inputs, slots, 1).attention.amax(1).mean() > soft(inputs, slots, 1).attention.amax(1).mean()


@pytest.mark.parametrize("name", list(INITIALIZERS))
def test_initial_slots_depend_on_the_generator_alone(name: str) -> None:
    torch.manual_seed(0)
    initialize = INITIALIZERS[name](Starts(K, S, GRID, 4))
    tokens, features = draw(B, N, S), draw(B, N, D)
    first, second = (initialize(tokens, features, Draws(3)) for _ in range(2))
    assert first.shape == (B, K, S)
    assert torch.equal(first, second)


def test_kmeans_slots_are_the_means_of_their_clusters() -> None:
    centres = 10 * torch.eye(K, D)
    labels = torch.arange(N) % K
    features = (centres[labels] + 0.01 * draw(N, D)).expand(B, N, D)
    tokens = draw(N, S).expand(B, N, S)
    slots = INITIALIZERS["kmeans"](Starts(K, S, GRID, 4))(tokens, features, Draws(0))
    means = torch.stack([tokens[0, labels == k].mean(0) for k in range(K)])
    for sample in slots:
        distance = torch.cdist(sample, means)
        assert float(distance.min(1).values.max()) < 1e-5 and len(distance.argmin(1).unique()) == K


def test_slots_start_at_what_stands_out_of_the_whole_frame() -> None:
    """Two blobs on a plain floor: the first peaks lie within them, one in each."""
    grid, floor, features = (6, 6), torch.eye(D)[0], torch.empty(6, 6, D)
    features[:] = floor
    features[:3, :3], features[3:, 4:] = torch.eye(D)[1], torch.eye(D)[2]
    found = Saliency(Starts(3, S, grid, saliency_weight=1.0)).peaks(features.view(1, 36, D) + 0.01 * draw(1, 36, D))
    places = [divmod(index, 6) for index in found[0].tolist()]
    assert [row < 3 and column < 3 for row, column in places] == [True, False, False]
    assert [row >= 3 and column >= 4 for row, column in places] == [False, True, False]


def test_an_attentions_temperature_multiplies_its_queries() -> None:
    torch.manual_seed(0)
    sharp, plain = Attention(S, 2, temperature=0.25), Attention(S, 2)
    plain.load_state_dict(sharp.state_dict())
    with torch.no_grad():
        for parameter in plain.to_query.parameters():
            parameter *= 4
    tokens, memory = draw(B, N, S), draw(B, K, S)
    torch.testing.assert_close(sharp(tokens, memory), plain(tokens, memory))
    torch.testing.assert_close(sharp.with_weights(tokens, memory)[1], plain.with_weights(tokens, memory)[1])


def learns(**options: object) -> SlotModel:
    """Check that a small model of these parts learns, and that all of it takes part; return it."""
    config = SlotAttentionConfig.model_validate(
        {"slots": K, "slot_dim": S, "slot_mlp_hidden": 16, "kmeans_rounds": 2, **options}
    )
    torch.manual_seed(0)
    model = SlotModel(config, Normaliser("none", D), (4, 4))
    features = draw(B, N, D) + torch.linspace(-1, 1, N)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for _ in range(20):
        loss = total(losses(model(features, Draws(0)), LossConfig()), LossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.9 * seen[0]
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, f"parameters without a gradient: {unused}"
    return model


@pytest.mark.slow
@pytest.mark.parametrize("decoder", list(DECODERS))
@pytest.mark.parametrize("gradient", ["full", "implicit", "bilevel"])
@pytest.mark.parametrize("initializer", list(INITIALIZERS))
def test_every_combination_learns_something(decoder: str, gradient: str, initializer: str) -> None:
    parts = {"decoder": {"kind": decoder, "hidden": 32}, "gradient": gradient, "iterations": 2}
    if (gradient, initializer) == ("implicit", "learnt"):
        with pytest.raises(ValidationError, match="use gradient = bilevel"):
            learns(initializer=initializer, **parts)
    else:
        learns(initializer=initializer, **parts)


def test_a_single_linear_projection_learns_too() -> None:
    assert isinstance(learns(projection="linear").project, nn.Linear)


def gradients(kind: str, iterations: int = 3) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Slots found, and the gradient of their sum: at the initial slots and at the inputs."""
    torch.manual_seed(0)
    module = SlotAttention(D, S, 16, gradient=kind).double()
    inputs, slots = draw(B, N, D).double().requires_grad_(), draw(B, K, S).double().requires_grad_()
    found = module(inputs, slots, iterations).slots
    weights = draw(B, K, S, seed=9).double()
    return found, inputs, list(torch.autograd.grad((found * weights).sum(), [slots, inputs], allow_unused=True))


def test_gradients_through_the_iterations() -> None:
    """All three find the same slots; ``implicit`` gives those of one iteration from where the others ended."""
    torch.manual_seed(0)
    module = SlotAttention(D, S, 16).double()
    inputs, start = draw(B, N, D).double(), draw(B, K, S).double()
    fixed = inputs.clone().requires_grad_()
    settled = module(inputs, start, 2).slots.detach().requires_grad_()
    last = (module(fixed, settled, 1).slots * draw(B, K, S, seed=9).double()).sum()
    to_slots, to_inputs = torch.autograd.grad(last, [settled, fixed])

    full, implicit, bilevel = (gradients(kind) for kind in ("full", "implicit", "bilevel"))
    for found, _, _ in (implicit, bilevel):
        torch.testing.assert_close(found, full[0])
    assert implicit[2][0] is None
    for at_inputs in (implicit[2][1], bilevel[2][1]):
        torch.testing.assert_close(at_inputs, to_inputs)
    torch.testing.assert_close(bilevel[2][0], to_slots)  # straight through to the initial slots
    assert full[2][1] is not None and not torch.allclose(full[2][1], to_inputs)


def test_padded_slots_take_nothing() -> None:
    torch.manual_seed(0)
    module, inputs, slots = SlotAttention(D, S, 16), draw(B, N, D), draw(B, K, S)
    active = torch.ones(B, K, dtype=torch.bool)
    active[:, -2:] = False
    active[0] = False  # a frame without any
    padded, alone = module(inputs, slots, 3, active), module(inputs[1:], slots[1:, :-2], 3)
    torch.testing.assert_close(padded.slots[1:, :-2], alone.slots)
    torch.testing.assert_close(padded.attention[1:, :-2], alone.attention)
    assert float(padded.attention[1:, -2:].detach().abs().max()) == 0
    assert bool(torch.isfinite(padded.slots).all())


def test_parameters_of_a_loaded_model_include_the_normaliser() -> None:
    mean, covariance = draw(D), draw(D, D)
    normaliser = Normaliser.from_statistics("whiten", mean, covariance @ covariance.T + torch.eye(D))
    model = SlotModel(SlotAttentionConfig(slots=K, slot_dim=S), normaliser, (4, 4))
    empty = SlotModel(SlotAttentionConfig(slots=K, slot_dim=S), Normaliser("whiten", D), (4, 4))
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.normaliser(draw(B, N, D)), normaliser(draw(B, N, D)))
    assert isinstance(model.project, nn.Sequential)


# -- the clustering model ----------------------------------------------------------------------------------


def scene(frames: int = 2, objects: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (F, 64, 12) of an 8x8 grid: noise near the origin, and squares of one direction each; labels (F, 64)."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:objects]
    labels = torch.zeros(frames, 8, 8, dtype=torch.long)
    for k in range(objects):
        labels[:, 1 : 3 + k, 3 * k : 3 * k + 2] = k + 1
    tokens = 0.2 * torch.randn(frames, 8, 8, 12, generator=generator)
    tokens[labels > 0] += 6 * directions[labels[labels > 0] - 1]
    return tokens.flatten(1, 2), labels.flatten(1)


def clustering(**options: object) -> ClusteringModel:
    torch.manual_seed(0)
    config = ClusteringConfig.model_validate({"slots": 6, "slot_dim": 12, "hidden": 16, **options})
    return ClusteringModel(config, Normaliser("none", 12), (8, 8))


def test_clustering_finds_the_objects_before_any_training() -> None:
    tokens, labels = scene()
    model = clustering(position_weight=0.3, new_slot_distance=1.0)  # a patch of this small grid is wide
    model.calibrate([tokens])
    output = model(tokens, Draws(0))
    torch.testing.assert_close(output.masks.sum(1), torch.ones(2, 64))
    assigned = output.masks.argmax(1)  # (F, 64)
    assert torch.equal(assigned == 0, labels == 0), "the first slot is the background"
    pairs = {(int(t), int(s)) for t, s in zip(labels.flatten(), assigned.flatten(), strict=True)}
    assert len(pairs) == 4, "one slot an object, one object a slot"
    _, active = model.find_slots(*model.encode(tokens))
    assert active.sum(1).tolist() == [3, 3], "as many slots as the frame needs"


def test_clustering_without_objects_gives_all_to_the_background() -> None:
    tokens, _ = scene()
    model = clustering()
    model.calibrate([tokens])
    output = model(0.1 * draw(2, 64, 12), Draws(0))
    assert float(output.masks[:, 0].detach().min()) > 0.5
    assert torch.isfinite(output.reconstruction).all()


def test_a_frame_that_is_displaced_as_a_whole_is_moved_back() -> None:
    """All tokens of a nearly empty frame may be far from where a training frame's are; objects still stand out."""
    tokens, labels = scene()
    model = clustering(position_weight=0.3, new_slot_distance=1.0)
    model.calibrate([tokens])
    away = tokens.clone()
    away[1] += 4 * model.otsu * F.normalize(torch.ones(12), dim=0)
    found = model(away, Draws(0)).masks.argmax(1)
    assert torch.equal(found == 0, labels == 0)
    assert torch.equal(model.tokens(away)[0], tokens[0]), "any other frame is as it was"


def test_large_objects_do_not_displace_a_frame() -> None:
    tokens, _ = scene()
    model = clustering()
    model.calibrate([tokens])
    crowded = 0.2 * draw(1, 64, 12)
    crowded[:, :44, 0] += 6  # one object on two thirds of the patches
    assert torch.equal(model.tokens(crowded), crowded)
    masks = model(crowded, Draws(0)).masks[0]
    assert bool((masks[0, :44] < 0.5).all()) and bool((masks[0, 44:] > 0.5).all())


def test_clips_train_across_time_and_every_parameter_learns() -> None:
    tokens, _ = scene(frames=8)
    model = clustering()
    model.calibrate([tokens])
    clips = tokens.view(2, 4, 64, 12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []
    for step in range(30):
        loss = total(losses(model(clips, Draws(step)), LossConfig()), LossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.7 * seen[0]
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_slots_of_one_frame_must_explain_another() -> None:
    """Slots are taken from a clip's first frame, and have to reconstruct its last one."""
    (first, _), (second, _) = scene(1, seed=0), scene(1, seed=5)
    model = clustering()
    model.calibrate([first, second])
    output = model(torch.stack([first, second], 1), Draws(0))  # (1, 2, 64, 12)
    torch.testing.assert_close(output.target, model(second, Draws(0)).target)
    torch.testing.assert_close(output.slots, model(first, Draws(0)).slots)


def test_otsu_parts_two_heaps() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(900, generator=generator), 10 + torch.randn(100, generator=generator)
    values = torch.cat([low, high])
    threshold = otsu_threshold(values)
    assert float(low.max()) < float(threshold) < float(high.min())
    torch.testing.assert_close(otsu_threshold(values * 7), threshold * 7, rtol=1e-2, atol=0)


def test_targets_have_unit_energy_whatever_the_scale() -> None:
    tokens, _ = scene(frames=6)
    energies = []
    for factor in (1.0, 30.0):
        model = clustering()
        model.calibrate([factor * tokens])
        energies.append(float(model(factor * tokens, Draws(0)).target.square().mean()))
    assert energies == pytest.approx([1.0, 1.0], rel=1e-4)


def test_shapes_are_checked_at_every_call() -> None:
    with pytest.raises(TypeCheckError):
        clustering()(draw(64, 12), Draws(0))
    with pytest.raises(TypeCheckError):
        SlotAttention(D, S, 16)(draw(B, N, D), draw(B + 1, K, S), 1)


def test_tokens_at_the_mean_send_no_huge_gradient() -> None:
    """Where a 3x3 neighbourhood is exactly the mean, a key has no direction yet."""
    model = clustering().train()
    features = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0)) * 4
    features[:, :32] = 0
    output = model(features, Draws(0))
    (output.reconstruction - output.target).square().mean().backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm < 100
