"""What extraction and training will need on a device, counted before they run."""
