"""Upkeep of stores: verify, repair, convert."""
