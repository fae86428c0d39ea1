"""The model that clusters tokens by learnt keys and follows objects through a video."""
