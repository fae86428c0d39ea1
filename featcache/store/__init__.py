"""The format of a store, all of it; nothing else knows its bytes."""
