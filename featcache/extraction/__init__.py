"""From a source and a backbone to a store."""
