"""Measured rates beside this machine's limits."""
