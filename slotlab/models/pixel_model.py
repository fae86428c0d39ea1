"""Slot attention on the frames themselves: the baseline for frozen features.

The model of Locatello et al. (2020, arXiv:2006.15055) in the sizes that SAVi gives for 64 px (Kipf et al., 2022,
arXiv:2111.12594): four 5x5 convolutions without stride, so that slots attend to the same grid of pixels that they
are decoded to, and both kinds of masks have one resolution; and a spatial broadcast decoder (Watters et al., 2019,
arXiv:1901.07017) that doubles its grid by transposed convolutions until it has that resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from slotlab.config.model import PixelConfig
from slotlab.config.schema import Config
from slotlab.models.base import Model, Output
from slotlab.models.competition import hide_padding
from slotlab.models.layers import MLP
from slotlab.models.normalise import Normaliser
from slotlab.models.randomness import Draws
from slotlab.models.recurrence import Recurrence

CONVOLUTIONS = 4  # of the encoder


def frame_tokens(frames: UInt8[Tensor, "*B H W 3"], grid: tuple[int, int]) -> Float[Tensor, "*B N 3"]:
    """The mean colour of each cell of the grid, in [-1, 1], row by row: one token a cell.

    The whole frame is resized, never cropped; a frame of other proportions than the grid is squeezed.
    """
    images = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2).float()  # (F, 3, H, W)
    cells = F.adaptive_avg_pool2d(images, grid)  # (F, 3, rows, columns): exact means where the sizes divide
    tokens = cells.flatten(2).transpose(1, 2) / 127.5 - 1
    return tokens.reshape(*frames.shape[:-3], *tokens.shape[1:])


class PixelModel(Model):
    """Slots of frames or clips of pixels, trained to reconstruct them.

    Targets are pixels normalised by the moments of the training split's colours, so that, as with features, predicting
    the mean has a squared error of about 1.

    Args:
        config: parts and sizes.
        normaliser: normalises colours; see :func:`slotlab.models.inputs.ModelInput.moments`.
        grid: rows and columns of pixels that the model sees, ``config.resolution`` each.
    """

    def __init__(self, config: PixelConfig, normaliser: Normaliser, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.normaliser, self.grid, self.slots = config, normaliser, grid, config.slots
        width, slot_dim = config.encoder_channels, config.slot_dim
        self.encode = nn.Sequential(
            *_layers([normaliser.dim, *[width] * CONVOLUTIONS], lambda i, o: nn.Conv2d(i, o, 5, padding=2))
        )
        self.encoder_position = PositionEmbedding(grid, width)
        self.project = MLP(nn.LayerNorm(width), nn.Linear(width, slot_dim), nn.ReLU(), nn.Linear(slot_dim, slot_dim))
        self.recur = Recurrence(config, slot_dim, grid)
        self.decode = BroadcastDecoder(config, normaliser.dim, grid)

    @classmethod
    def of(cls, config: Config, normaliser: Normaliser, grid: tuple[int, int]) -> PixelModel:
        assert isinstance(config.model, PixelConfig)
        return cls(config.model, normaliser, grid)

    def forward(self, features: UInt8[Tensor, "B H W 3"] | UInt8[Tensor, "B T H W 3"], draws: Draws) -> Output:
        """The training pass on stored frames, or, with a predictor, on clips. ``ValueError`` for clips without one."""
        clips = features if features.ndim == 5 else features.unsqueeze(1)
        if clips.shape[1] > 1 and self.recur.predict is None:
            raise ValueError("clips of several frames need a model with a predictor")
        target = self.normaliser(frame_tokens(clips, self.grid))  # (B, T, N, C)
        tokens = self.tokens(target.flatten(0, 1)).view(*target.shape[:3], -1)  # (B, T, N, S)
        attended = self.recur(tokens, tokens, draws)  # B * T frames from here on
        reconstruction, masks = self.decode(attended.slots, attended.active)
        lead = features.shape[:-3]  # (B,) or (B, T)
        return Output(
            slots=attended.slots.unflatten(0, lead),
            attention=attended.attention.unflatten(0, lead),
            logits=attended.logits.unflatten(0, lead),
            masks=masks.unflatten(0, lead),
            reconstruction=reconstruction.unflatten(0, lead),
            target=target.flatten(0, 1).unflatten(0, lead),
            grid=self.grid,
        )

    def segment(self, features: UInt8[Tensor, "T H W 3"], draws: Draws) -> Output:
        """Slots and masks of all frames of one video; a predictor carries the slots from frame to frame."""
        if self.recur.predict is None:
            return super().segment(features, draws)
        output: Output = self(features.unsqueeze(0), draws)
        return output.sample(0)

    def before_compiling(self) -> None:
        self.recur.before_compiling()

    def tokens(self, pixels: Float[Tensor, "B N C"]) -> Float[Tensor, "B N S"]:
        """The tokens that slots attend to: convolved pixels with their position."""
        # A permuted view has its channels last in memory, where convolutions are fastest on a CPU.
        images = pixels.reshape(len(pixels), *self.grid, -1).permute(0, 3, 1, 2)  # (B, C, rows, columns)
        encoded = self.encode(images).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, E)
        tokens: Tensor = self.project(encoded + self.encoder_position())
        return tokens


class PositionEmbedding(nn.Module):
    """Linear map of each cell's distances from the four borders (Locatello et al., 2020)."""

    distances: Tensor  # (N, 4) in [0, 1]

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        axes = [torch.linspace(0, 1, side) for side in grid]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
        self.register_buffer("distances", torch.cat([place, 1 - place], -1), persistent=False)
        self.embed = nn.Linear(4, width)

    def forward(self) -> Float[Tensor, "N E"]:
        embedding: Tensor = self.embed(self.distances)
        return embedding


class BroadcastDecoder(nn.Module):
    """Spatial broadcast decoder: copies each slot to a small grid with positions, and upsamples it to picture and mask.

    Args:
        config: ``broadcast`` is the side of the small grid.
        channels: channels of the picture.
        grid: rows and columns of the picture.
    """

    def __init__(self, config: PixelConfig, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.start, self.channels = (config.broadcast, config.broadcast), channels
        self.position = PositionEmbedding(self.start, config.slot_dim)
        doublings = (grid[0] // config.broadcast).bit_length() - 1
        self.grow = nn.Sequential(
            *_layers(
                [config.slot_dim, *[config.decoder_channels] * doublings],
                lambda i, o: nn.ConvTranspose2d(i, o, 5, stride=2, padding=2, output_padding=1),
            ),
            nn.Conv2d(config.decoder_channels, channels + 1, 3, padding=1),
        )

    def forward(
        self, slots: Float[Tensor, "B K S"], active: Bool[Tensor, "B K"] | None = None
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B K N"]]:
        """Reconstruction, and masks that sum to one over the slots. ``active``: False for padded slots."""
        batch, count, _ = slots.shape
        laid_out = slots.flatten(0, 1).unsqueeze(1) + self.position()  # (B K, n, S)
        grown = self.grow(laid_out.unflatten(1, self.start).permute(0, 3, 1, 2))  # (B K, C + 1, rows, columns)
        layers = grown.float().flatten(2).unflatten(0, (batch, count))  # (B, K, C + 1, N)
        masks = hide_padding(layers[:, :, -1], active).softmax(dim=1)  # (B, K, N)
        return torch.einsum("bkn,bkcn->bnc", masks, layers[:, :, : self.channels]), masks


def _layers(widths: list[int], make: Callable[[int, int], nn.Module]) -> list[nn.Module]:
    """A convolution from each width to the next, each followed by a ReLU."""
    return [layer for i, o in pairwise(widths) for layer in (make(i, o), nn.ReLU())]
