"""A predictor of what tracked slots do next."""
