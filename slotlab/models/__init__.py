"""Models: from features to slots and masks. They open no file; only inputs.py reads a store."""
