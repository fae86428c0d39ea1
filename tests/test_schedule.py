"""What changes with the step: the learning rate, and the average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from slotlab.config.load import load_config
from slotlab.training.schedule import learning_rate, make_schedule, update_average, warmup_steps
from tests.training import small


@pytest.mark.parametrize("decay", ["cosine", "exponential", "constant"])
def test_schedules_warm_up_and_decay(decay: str) -> None:
    overrides = (f"optim.decay={decay}", "optim.half_life=20", "optim.warmup_steps=10", "optim.learning_rate=1.0")
    optim = small(*overrides, optim__steps=50).optim
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(optimizer, optim)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[30] == pytest.approx({"cosine": 0.5, "exponential": 0.5, "constant": 1.0}[decay])


def test_the_rate_grows_with_the_batch_and_the_warm_up_counts_samples() -> None:
    optim = small("optim.reference_batch=64", "optim.warmup_samples=640").optim
    for batch, scaling, factor in ((64, "sqrt", 1), (256, "sqrt", 2), (256, "linear", 4), (16, "linear", 0.25)):
        scaled = optim.model_copy(update={"batch_size": batch, "scaling": scaling, "steps": 1000})
        assert learning_rate(scaled) == pytest.approx(factor * optim.learning_rate)
        assert warmup_steps(scaled) == math.ceil(640 / batch)


def test_a_run_made_short_is_not_all_warm_up() -> None:
    assert [warmup_steps(load_config("dinosaur", optim__steps=n).optim) for n in (10_000, 1000, 10, 1)] == [
        1000,
        200,
        2,
        0,
    ]


def test_averaged_weights_forget_how_they_began() -> None:
    """Even where the run is short beside 1 / (1 - ema) steps; in a long one the decay is what was asked for."""
    average, model = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((average, 1.0), (model, 0.0)):
        nn.init.constant_(module.weight, value)
    optim = small("optim.ema=0.999").optim
    for step in range(1, 201):
        update_average(average, model, optim, step)
    assert 0 < average.weight.item() < 1e-6
    nn.init.constant_(average.weight, 1.0)
    update_average(average, model, optim, 100_000)
    assert average.weight.item() == pytest.approx(0.999)
