"""From features to slots and masks. Knows no file."""
