"""Decoded pixels in [-1, 1] become the whole range of uint8: what lies below mid-grey is not black."""

from __future__ import annotations

import torch

from lapwan.wan.vae import to_frames


def test_minus_one_is_black_zero_is_grey_one_is_white():
    pixels = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]).view(1, 1, 1, 1, -1).expand(1, 3, 2, 1, -1)
    frames = to_frames(pixels)
    assert frames.shape == (2, 1, 7, 3) and frames.dtype.name == "uint8"
    assert frames[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]
