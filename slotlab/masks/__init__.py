"""Masks: from soft masks on the patch grid to labels of pixels. Uses no ground truth."""
