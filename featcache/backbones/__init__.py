"""Frozen backbones: frames to patch tokens. Knows no store."""
