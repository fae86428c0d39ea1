"""slotlab: train, evaluate and compare slot models on cached features."""

from featcache import __version__

__all__ = ["__version__"]
