"""Differentiable judges of images: HPS v2.1, CLIP, PickScore. See `base` for the seam and how to add one."""
