"""From soft masks to pixels. Knows no ground truth."""
