"""From store to store: verify, repair, convert."""
