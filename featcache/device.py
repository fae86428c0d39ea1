"""Where to compute."""

from __future__ import annotations

import torch

from featcache.errors import UsageError


def pick_device(name: str = "auto") -> torch.device:
    """The named device, or with ``auto`` the fastest there is. ``UsageError`` where the machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: not on this machine ({str(error).splitlines()[0]}); use cpu") from error
