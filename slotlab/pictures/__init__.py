"""From masks and frames to files for eyes and other programs."""
