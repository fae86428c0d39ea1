"""Statistics that the package ships, and how they are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slotlab.models import whitening
from slotlab.models.normalise import Normaliser
from slotlab.models.whitening import Natural, natural, save_natural


def test_what_is_saved_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "FOLDER", tmp_path)
    x = (
        torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
        @ torch.arange(36.0).view(6, 6).double()
    )
    made = Natural(x.mean(0), x.T.cov(), 17)
    path = save_natural(made, "timm:some/model", "block2", {"of": "noise"}, tmp_path)
    assert path.parent == tmp_path
    found = natural("timm:some/model", "block2")
    assert found is not None and found.pictures == 17
    torch.testing.assert_close(found.mean, made.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.covariance, made.covariance, rtol=1e-3, atol=1e-3)
    assert natural("timm:some/model", "block3") is None


def test_the_shipped_statistics_are_of_dinov2() -> None:
    """Its tokens have the standard deviation that DINOv2 ViT-S/14 has before its last norm, 2.4, and a covariance."""
    found = natural("dinov2_vits14", "block12")
    assert found is not None and found.mean.shape == (384,) and found.pictures > 50
    assert 2.1 < float((found.covariance.diagonal().mean() + found.mean.var()).sqrt()) < 2.7
    assert torch.equal(found.covariance, found.covariance.T)
    assert float(torch.linalg.eigvalsh(found.covariance).min()) > -0.01
    white = Normaliser.from_statistics("whiten", found.mean, found.covariance, shrinkage=0.1).weight.double()
    after = white @ found.covariance @ white
    assert float(after.diagonal().mean()) == pytest.approx(1, rel=1e-3)
    assert sum(file.stat().st_size for file in whitening.FOLDER.iterdir()) < 400_000
