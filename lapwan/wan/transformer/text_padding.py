"""Attention over a padded text as attention over its words and one row of padding: the same result from fewer rows.

Wan attends 512 rows of text without a mask, and the rows after the text are all zeros: w copies of one key k₀ and one
value v₀.
    softmax over w equal logits ℓ₀:  w·exp(ℓ₀) = exp(ℓ₀ + log w)
So r rows of padding with log(w / r) added to their logits do what w rows did (`fold_padding`). On a CPU and with short
videos the rows of the text are most of the work. On a GPU a bias would cost the fast attention kernel more than it
saves. There the keys and values of one row of padding are computed, and repeated as often as there is padding
(`trim_padding`, `repeat_last`).
Shapes: B samples, L rows of text, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_padding(text_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    """The text without most of its padding, and what to add to the logits [B, 1, 1, L']; None if nothing is folded.

    Only plain tensors on a CPU are folded: a fake or meta tensor has no values to tell where the text ends. Not in
    bf16, which would round the logarithm by a hundredth.
    """
    if type(text_BLD) is not Tensor or text_BLD.device.type != "cpu" or text_BLD.requires_grad:
        return text_BLD, None
    if text_BLD.dtype not in (torch.float32, torch.float64):
        return text_BLD, None
    rows = text_BLD.shape[1]
    is_text_BL = text_BLD.ne(0).any(dim=2)
    words_B = torch.where(is_text_BL, torch.arange(1, rows + 1), 0).amax(dim=1)
    kept = int(words_B.max()) + 1
    if kept > 3 * rows // 4:
        return text_BLD, None
    padding_B = (rows - words_B).double() / (kept - words_B)
    is_padding_BL = torch.arange(kept) >= words_B[:, None]
    bias_BL = torch.where(is_padding_BL, padding_B.log()[:, None], 0.0)
    return text_BLD[:, :kept], bias_BL[:, None, None].to(text_BLD.dtype)


def trim_padding(text_BLD: Tensor) -> tuple[Tensor, int]:
    """The text up to its first row of padding, and how many rows that one represents. Synchronises with the device."""
    if type(text_BLD) is not Tensor or text_BLD.is_meta:
        return text_BLD, 1
    rows = text_BLD.shape[1]
    is_text_L = text_BLD.ne(0).any(dim=2).any(dim=0)
    words = int(torch.where(is_text_L, torch.arange(1, rows + 1, device=text_BLD.device), 0).amax())
    return (text_BLD, 1) if words >= rows else (text_BLD[:, : words + 1], rows - words)


def repeat_last(x: Tensor, times: int) -> Tensor:
    """[B, M, ...] -> [B, M - 1 + times, ...]: the last row `times` times."""
    if times == 1:
        return x
    last = x[:, -1:].expand(-1, times, *x.shape[2:])
    return torch.cat([x[:, :-1], last], dim=1)
