"""Models that others published: their checkpoints as runs."""
