"""From moments to the scale report."""
