"""The preset log-2026 against its source's model, written out plainly: slots, masks, tokens, loss, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotlab.config.load import load_config
from slotlab.config.model import SlotAttentionConfig
from slotlab.models.decoders.spatial import SpatialBroadcastDecoder
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.slot_model import SlotModel
from slotlab.training.losses import losses, total

B, D, K, S, H, ROUNDS = 9, 12, 9, 64, 16, 5
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


class Source(nn.Module):
    """The model as published: a picture of features for every slot, every layer on all of it.

    Fields are named as ours so that weights can be copied; ``grid`` has (rows, columns).
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.project = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, S))
        self.mean, self.log_sigma = nn.Parameter(torch.empty(1, K, S)), nn.Parameter(torch.empty(1, 1, S))
        self.norm_inputs, self.norm_slots = nn.LayerNorm(S), nn.LayerNorm(S)
        self.to_key, self.to_value, self.to_query = (nn.Linear(S, S, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(S, S)
        self.mlp = nn.Sequential(nn.LayerNorm(S), nn.Linear(S, 128), nn.ReLU(), nn.Linear(128, S))
        self.widen = nn.Sequential(nn.LayerNorm(S), nn.Linear(S, 128), nn.ReLU(), nn.Linear(128, H))
        self.decoder = nn.Sequential(
            nn.Conv2d(H + 2, H, 5, padding=2), nn.ReLU(), nn.Conv2d(H, H, 5, padding=2), nn.ReLU(),
            nn.Conv2d(H, D + 1, 3, padding=1),
        )  # fmt: skip

    def attend(self, features: Tensor, noise: Tensor) -> Tensor:
        inputs = self.norm_inputs(self.project(features))
        slots = self.mean + self.log_sigma.exp() * noise
        keys, values = self.to_key(inputs), self.to_value(inputs)
        for _ in range(ROUNDS):
            queries = self.to_query(self.norm_slots(slots))
            attention = (torch.einsum("bks,bns->bkn", queries, keys) * S**-0.5).softmax(1) + 1e-8
            updates = torch.einsum("bkn,bns->bks", attention / attention.sum(-1, keepdim=True), values)
            slots = self.gru(updates.reshape(-1, S), slots.reshape(-1, S)).view(-1, K, S)
            slots = slots + self.mlp(slots)
        return slots

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = self.grid
        laid_out = self.widen(slots).view(-1, H, 1, 1).expand(-1, -1, rows, columns)
        place = torch.empty(2, rows, columns, dtype=slots.dtype)
        place[0] = torch.linspace(-1, 1, columns)  # x
        place[1] = torch.linspace(-1, 1, rows)[:, None]  # y
        out = self.decoder(torch.cat([laid_out, place.expand(len(laid_out), -1, -1, -1)], 1))
        out = out.view(-1, K, D + 1, rows, columns)
        logits = out[:, :, D:] / 0.5
        masks = logits.clamp(-10, 10).softmax(1)
        return (out[:, :, :D] * masks).sum(1).flatten(2).transpose(1, 2), masks.flatten(2), logits


def copy_weights(model: SlotModel, source: Source) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Give the source our weights; return the pairs of parameters."""
    decoder = model.decode
    assert isinstance(decoder, SpatialBroadcastDecoder)
    attention = model.recur.attend
    initial: Any = model.recur.initialize
    modules: list[tuple[nn.Module | None, nn.Module]] = [
        (model.project, source.project), (attention.norm_inputs, source.norm_inputs),
        (attention.norm_slots, source.norm_slots), (attention.to_key, source.to_key),
        (attention.to_value, source.to_value), (attention.to_query, source.to_query), (attention.gru, source.gru),
        (attention.mlp, source.mlp), (decoder.widen, source.widen), (decoder.first, source.decoder[0]),
        (decoder.hidden[1], source.decoder[2]), (decoder.last, source.decoder[4]),
    ]  # fmt: skip
    pairs = {"mean": (initial.mean, source.mean), "log_sigma": (initial.log_std, source.log_sigma)}
    for ours, theirs in modules:
        assert ours is not None
        named = dict(theirs.named_parameters())
        pairs |= {f"{id(theirs)}.{name}": (p, named[name]) for name, p in ours.named_parameters()}
    with torch.no_grad():
        for mine, its in pairs.values():
            its.copy_(mine)
    assert {id(mine) for mine, _ in pairs.values()} == {id(p) for p in model.parameters()}
    assert {id(its) for _, its in pairs.values()} == {id(p) for p in source.parameters()}
    return pairs


# A grid with a middle, one that is all border along an axis, and one that is smaller than the kernel.
@pytest.mark.parametrize("grid", [(7, 6), (5, 9), (3, 4)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scale", [1.0, 500.0])  # of the logits: with the second, some are clamped
@pytest.mark.parametrize("loss", ["feature_mse", "layer_norm_mse"])
def test_it_is_the_published_model(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], recompute: bool, scale: float, loss: str
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # slots, masks and losses are float32 else
    torch.manual_seed(0)
    weights = [f"loss.{name}={float(name == loss)}" for name in ("feature_mse", "layer_norm_mse")]
    overrides = [f"model.decoder.hidden={H}", f"model.decoder.recompute={str(recompute).lower()}", *weights]
    config = load_config("log-2026", None, overrides)
    assert isinstance(config.model, SlotAttentionConfig)
    model, source = SlotModel(config.model, Normaliser("none", D), grid).double(), Source(grid).double()
    decoder: Any = model.decode
    with torch.no_grad():
        decoder.last.weight[-1] *= scale
    pairs = copy_weights(model, source)
    features = 2.4 * torch.randn(B, grid[0] * grid[1], D, dtype=torch.float64)

    output = model(features, Draws(0))
    ours = total(losses(output, config.loss), config.loss)
    slots = source.attend(features, Draws(0).normal((B, K, S), features.device).double())
    tokens, masks, logits = source.decode(slots)
    assert (
        0 < float((logits.abs() > 10).double().mean()) < 0.9 if scale > 1 else float(logits.detach().abs().max()) < 10
    )
    norm = F.layer_norm if loss == "layer_norm_mse" else lambda values, shape: values
    unit = slots / slots.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.transpose(1, 2) * (1 - torch.eye(K))
    theirs = (norm(tokens, [D]) - norm(features, [D])).square().mean() + 0.01 * cosines.sum() / (B * K * (K - 1))

    torch.testing.assert_close(output.slots, slots, **CLOSE)
    torch.testing.assert_close(output.reconstruction, tokens, **CLOSE)
    torch.testing.assert_close(output.masks, masks, **CLOSE)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours.backward()
    theirs.backward()
    largest = max(float(its.grad.abs().max()) for _, its in pairs.values() if its.grad is not None)
    for name, (mine, its) in pairs.items():
        assert mine.grad is not None and its.grad is not None, name
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-7, atol=1e-12 * largest)


def test_the_spread_is_one_for_all_slots_and_the_means_are_not() -> None:
    config = load_config("log-2026").model
    assert isinstance(config, SlotAttentionConfig)
    initial: Any = SlotModel(config, Normaliser("none", D), (4, 4)).recur.initialize
    assert initial.mean.shape == (1, K, S) and initial.log_std.shape == (1, 1, S)
    assert len(initial.mean[0].unique(dim=0)) == K
