"""Scoring: from a model's output and the ground truth to scores. Prints nothing."""
