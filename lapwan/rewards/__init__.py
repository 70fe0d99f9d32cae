"""Differentiable image rewards: HPS v2.1, CLIP, PickScore. `base` has the interface and how to add one, `build` makes
them from settings."""
