"""The configuration of a run. Imports neither torch nor any other part of slotlab."""
