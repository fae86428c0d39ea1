"""The scale of features: reports from moments, and moments computed again."""
