"""Training-free segments (TFS): the parts of a frame, from its patch tokens alone, without a number of parts.

Tokens are whitened by the data set's statistics (:class:`~slotlab.models.normalise.Normaliser`, kind ``whiten``) and
made unit vectors z. z' is the unit mean of a patch's 3 x 3 neighbours, each weighted by ``max(cosine, 0)``: that evens
out noise and does not reach across edges. Two patches belong together by

    affinity = (z.z + z'.z') / 2 - 0.6 * distance in patches / side of the grid

and average linkage joins patches and groups of patches as long as their mean affinity is above 1 - cut. A model may
start from these segments; by themselves they are the floor that a trained model has to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import eigh
from scipy.spatial.distance import squareform
from torch import Tensor

from featcache.errors import DataError
from slotlab.models.host import all_finite, found_on_host

SHRINKAGE = 0.1  # of the covariance that whitens the tokens
CUT = 0.6  # 1 - the least mean affinity of what is joined
POSITION = 0.6  # affinity that a distance of the grid's whole side costs
MOST = 64  # segments of a frame
TEMPERATURE = 0.1  # of soft masks
NEAR = 3.0  # standard deviation of the Gaussian of normalised cuts, in patches
LARGEST_CUT = 0.6  # normalised cut up to which a group is split
MOST_PATCHES = 1024  # of a grid whose segments take no longer than a fraction of a second a frame

_LEAST_WEIGHT = 1e-6  # so that every patch has neighbours
_VALUES_A_CHUNK = 2**22  # affinities held at once: 16 MB


@torch.no_grad()
def segments(
    tokens: Float[Tensor, "T N D"], grid: tuple[int, int], cut: float = CUT, most: int = MOST
) -> Int[Tensor, "T N"]:
    """The segment of each patch, int64: 0 is the frame's largest, ties go to the one that begins first.

    tokens of any float type, whitened (or learnt keys); N = rows * columns of the grid, row by row. Each frame is cut
    by itself. A frame that falls into more than ``most`` segments is cut higher, so that it has at most as many.
    ``DataError`` for NaN or infinity.
    """
    found = [_labels(part, cut, most) for part in _affinities(tokens, grid)]
    return torch.cat(found) if found else torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


@torch.no_grad()
def soft_segments(
    tokens: Float[Tensor, "T N D"],
    grid: tuple[int, int],
    cut: float = CUT,
    most: int = MOST,
    temperature: float = TEMPERATURE,
) -> Float[Tensor, "T K N"]:
    """Masks of :func:`segments` that sum to one over a frame's segments; a frame with fewer has empty ones at the end.

    A softmax over the segments of each patch's mean affinity to their patches. Upsampled, these find an edge between
    two patches where labels would put it half way.
    """
    found = []
    for part in _affinities(tokens, grid):
        member = F.one_hot(_labels(part, cut, most)).float()  # (t, N, K)
        size = member.sum(1, keepdim=True)  # (t, 1, K)
        mean = (part @ member / size.clamp_min(1)).masked_fill(size == 0, -torch.inf)
        found.append((mean / temperature).softmax(-1).mT)
    count = max((len(one[0]) for one in found), default=1)
    masks = [F.pad(one, (0, 0, 0, count - one.shape[1])) for one in found]
    return torch.cat(masks) if masks else tokens.new_zeros((0, count, tokens.shape[1]), dtype=torch.float32)


@torch.no_grad()
def normalised_cuts(
    tokens: Float[Tensor, "T N D"], grid: tuple[int, int], largest: float = LARGEST_CUT, most: int = MOST
) -> Int[Tensor, "T N"]:
    """Segments by recursive normalised cuts (Shi & Malik 2000, IEEE TPAMI 22(8)), numbered as those of `segments`.

    The weight of two patches is their likeness, if that is positive, times a Gaussian of their distance. A group is
    split where its second generalised eigenvector, at its best threshold, has the least normalised cut, as long as that
    is below ``largest``.
    """
    near = torch.exp(-distances(grid).square() / (2 * NEAR**2)).double()
    found = []
    for part in _parts(tokens, grid):
        weights = likeness(part, grid).cpu().double().clamp_min(_LEAST_WEIGHT) * near
        found += [_largest_first(_split(one, largest, most)) for one in weights.numpy()]
    return torch.from_numpy(np.asarray(found, np.int64).reshape(tokens.shape[:2])).to(tokens.device)


@torch.no_grad()
def affinity(tokens: Float[Tensor, "T N D"], grid: tuple[int, int]) -> Float[Tensor, "T N N"]:
    """How well two patches belong together: likeness, up to 1, less a penalty for distance. float32."""
    return likeness(tokens, grid).sub_(distances(grid).to(tokens.device), alpha=POSITION / side(grid))


def _affinities(tokens: Tensor, grid: tuple[int, int]) -> Iterator[Tensor]:
    """Affinities of a few frames at a time."""
    for part in _parts(tokens, grid):
        yield affinity(part, grid)


def _parts(tokens: Tensor, grid: tuple[int, int]) -> Iterator[Tensor]:
    """A few frames at a time, checked."""
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[1]} tokens a frame do not lie on a grid of {grid[0]} x {grid[1]}")
    if not all_finite(tokens):
        raise DataError(
            "tokens hold NaN or infinity, so they have no segments; check the backbone's weights, "
            "or its store with slotlab verify"
        )
    if len(tokens):
        yield from torch.split(tokens, max(1, _VALUES_A_CHUNK // tokens.shape[1] ** 2))


def likeness(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine of two patches, averaged with that of their smoothed vectors, (T, N, N) float32."""
    with torch.autocast(tokens.device.type, enabled=False):
        z = _unit(tokens.float())
        smooth = smoothed(z, grid)
        return torch.baddbmm(z @ z.mT, smooth, smooth.mT, beta=0.5, alpha=0.5)


def smoothed(z: Float[Tensor, "T N D"], grid: tuple[int, int]) -> Float[Tensor, "T N D"]:
    """Unit means of the 3 x 3 neighbours of unit vectors, each weighted by ``max(cosine, 0)``."""
    return _unit(_neighbourhood(z.reshape(len(z), *grid, -1)).flatten(1, 2))


def side(grid: tuple[int, int]) -> float:
    """Side of the square grid with as many patches."""
    return float((grid[0] * grid[1]) ** 0.5)


def distances(grid: tuple[int, int]) -> Tensor:
    """Distance of two places of a grid in patches, (N, N)."""
    places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()  # (N, 2)
    return torch.cdist(places, places)


def _unit(x: Tensor) -> Tensor:
    """Unit vectors (..., D). Zero has no direction: all zeros get one and the same, so that they are alike."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, x.shape[-1] ** -0.5)


def _neighbourhood(z: Tensor) -> Tensor:
    """Sums of the 3 x 3 neighbours of unit vectors (T, rows, columns, D), weighted by ``max(cosine, 0)``."""
    rows, columns = z.shape[1:3]
    around = F.pad(z, (0, 0, 1, 1, 1, 1))  # beyond the grid 0, which has no weight
    total = torch.zeros_like(z)
    for down in range(3):
        for right in range(3):
            neighbour = around[:, down : down + rows, right : right + columns]
            total += (z * neighbour).sum(-1, keepdim=True).clamp_min(0) * neighbour
    return total


def _labels(affinities: Tensor, cut: float, most: int) -> Tensor:
    """Segments (T, N) of frames with affinities (T, N, N)."""
    distances = (1 - affinities).clamp_min_(0).double()
    return found_on_host(distances, partial(_joined, cut=cut, most=most), distances.shape[1])


def _joined(distance: npt.NDArray[np.float64], cut: float, most: int) -> npt.NDArray[np.int64]:
    """Groups (N,) by average linkage of distances (N, N)."""
    count = len(distance)
    if count == 1:
        return np.zeros(1, np.int64)
    tree = linkage(squareform(distance, checks=False), "average")
    if count > most:
        cut = max(cut, tree[count - most - 1, 2])  # heights of the joints rise
    return _largest_first(fcluster(tree, cut, "distance"))


def _largest_first(labels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[inverse.reshape(-1)]


# -- normalised cuts ---------------------------------------------------------------------------------------


def _split(weights: npt.NDArray[np.float64], largest: float, most: int) -> npt.NDArray[np.int64]:
    """Groups (N,) by weights (N, N)."""
    labels, count, todo = np.zeros(len(weights), np.int64), 1, [0]
    while todo and count < most:
        group = todo.pop(0)
        members = np.flatnonzero(labels == group)
        cut, apart = _best_cut(weights[np.ix_(members, members)])
        if cut < largest:
            labels[members[apart]] = count
            todo += [group, count]
            count += 1
    return labels


def _best_cut(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.bool_]]:
    """The least normalised cut among the thresholds of the second eigenvector, and the patches (N,) above it."""
    count = len(weights)
    if count < 2:
        return np.inf, np.zeros(count, np.bool_)
    scale = weights.sum(1) ** -0.5
    _, vectors = eigh(scale[:, None] * weights * scale, subset_by_index=[count - 2, count - 1])  # rising
    order = np.argsort(scale * vectors[:, 0], kind="stable")
    ordered = weights[np.ix_(order, order)]
    volume = ordered.sum(1).cumsum()  # of the first 1, 2, ... patches
    within = ordered.cumsum(0).cumsum(1).diagonal()
    between = (volume - within)[:-1]
    cuts = between / volume[:-1] + between / (volume[-1] - volume[:-1])
    best = int(cuts.argmin())
    apart = np.zeros(count, np.bool_)
    apart[order[best + 1 :]] = True
    return float(cuts[best]), apart
