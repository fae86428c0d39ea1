"""Slots that start from the segments of learnt keys."""
