"""A forecaster of patch tokens, without slots, to compare slots with: a small one of DINO-WM's kind
(Zhou et al., 2024, arXiv:2411.04983).

A residual transformer over the tokens of the last ``burn_in`` frames, which attend within their frame, and each place
over time, by turns. Its own predictions are fed back.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from slotlab.config.model import DenseConfig
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.dynamics.blocks import SequentialBlock, time_code
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws


class DenseModel(Model):
    """Predicts the tokens of the frames to come. It finds no slots: its one mask is all of the frame."""

    time: Tensor  # (L, 1, W)

    def __init__(self, config: DenseConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.normaliser, self.grid, self.slots = config, normaliser, grid, 1
        width = config.width
        self.register_buffer("time", time_code(config.burn_in, width))
        self.embed = nn.Linear(normaliser.dim, width)
        self.position = nn.Parameter(torch.randn(grid[0] * grid[1], width) * width**-0.5)
        self.blocks = nn.ModuleList(SequentialBlock(width, config.heads, 4 * width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.change = nn.Linear(width, normaliser.dim)
        nn.init.zeros_(self.change.weight)
        nn.init.zeros_(self.change.bias)

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> DenseModel:
        assert isinstance(config.model, DenseConfig)
        return cls(config.model, normaliser, grid)

    def forward(self, features: Float[Tensor, "B T N D"], draws: Draws) -> Output:
        """The training pass on clips: the frames after the first ``burn_in`` are predicted. ``*B`` is (B, H)."""
        tokens = self.normaliser(features)
        burn_in = self.config.burn_in
        return self._output(self.roll_out(tokens[:, :burn_in], tokens.shape[1] - burn_in), tokens[:, burn_in:])

    def segment(self, features: Float[Tensor, "T N D"], draws: Draws) -> Output:
        """The first ``burn_in`` frames of a video as they were seen, and the others as predicted from them."""
        tokens = self.normaliser(features)
        seen = tokens[: self.config.burn_in]
        future = self.roll_out(seen.unsqueeze(0), len(tokens) - len(seen))[0]
        return self._output(torch.cat([seen, future]), tokens)

    def roll_out(self, tokens: Float[Tensor, "B L N D"], steps: int) -> Float[Tensor, "B H N D"]:
        """The normalised tokens of the next frames."""
        found = [tokens[:, :0]]
        used = torch.ones(len(tokens), tokens.shape[2], dtype=torch.bool, device=tokens.device)
        for _ in range(steps):
            hidden = self.embed(tokens) + self.position + self.time[-tokens.shape[1] :]
            for block in self.blocks:
                hidden = block(hidden, used)
            found.append((tokens[:, -1] + self.change(self.norm(hidden[:, -1]))).unsqueeze(1))
            tokens = torch.cat([tokens[:, 1:], found[-1]], 1)
        return torch.cat(found, 1)

    def _output(self, predicted: Float[Tensor, "*B N D"], target: Float[Tensor, "*B N D"]) -> Output:
        whole = torch.ones_like(predicted[..., 0]).unsqueeze(-2)  # (*B, 1, N)
        return Output(
            slots=predicted.mean(-2, keepdim=True),
            attention=whole,
            logits=torch.zeros_like(whole),
            masks=whole,
            reconstruction=predicted,
            target=target,
            grid=self.grid,
        )
