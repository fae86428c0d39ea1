"""What this machine reaches beside its own limits."""
