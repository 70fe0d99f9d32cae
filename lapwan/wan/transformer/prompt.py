"""The text as the blocks attend it: without most of its padding, and for a generation embedded once.

Wan attends 512 rows of text without a mask, and the rows after the text are all zeros: w copies of one key k₀ and one
value v₀.
    softmax over w equal logits ℓ₀:  w·exp(ℓ₀) = exp(ℓ₀ + log w)
So r rows of padding with log(w / r) added to their logits do what w rows did (`fold_padding`). On a CPU and with short
videos the rows of the text are most of the work. On a GPU a bias would cost the fast attention kernel more than it
saves. There the keys and values of one row of padding are computed, and repeated as often as there is padding
(`trim_padding`, `repeat_last`).
Shapes: B samples, L rows of padded text, M rows that are kept, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapwan.lora.layer import StackedLoraLinear
from lapwan.models.spec import TEXT_LENGTH
from lapwan.wan.text import pad_text
from lapwan.wan.transformer.block import KeysValues, text_keys_values

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class TextRows:
    """Features of a text, before or after the text embedder.

    Args:
        bias: [B, 1, 1, M], added to the logits of the rows; None: 0.
        last_row_count: how many rows of the padded text the last row represents.
    """

    rows_BMD: Tensor
    bias: Tensor | None = None
    last_row_count: int = 1

    @cached_property
    def all_BLD(self) -> Tensor:
        """Every row."""
        return repeat_last(self.rows_BMD, self.last_row_count)

    def keys_values(self, attention: Any) -> KeysValues:
        """A block's keys and values of every row, each computed once."""
        return self.repeated(text_keys_values(attention, self.rows_BMD))

    def repeated(self, keys_values: KeysValues) -> KeysValues:
        """Keys and values of the kept rows as those of every row."""
        k, v = keys_values
        return repeat_last(k, self.last_row_count), repeat_last(v, self.last_row_count)

    def take(self, samples: slice | Tensor) -> TextRows:
        """Some samples of the batch."""
        bias = None if self.bias is None else self.bias[samples]
        return TextRows(self.rows_BMD[samples], bias, self.last_row_count)

    def embedded(self, transformer: WanTransformer3DModel) -> TextRows:
        """The rows after the transformer's text embedder."""
        rows = transformer.condition_embedder.text_embedder(self.rows_BMD)
        return TextRows(rows, self.bias, self.last_row_count)


class Prompt:
    """A generation's text, without most of its padding. Each backbone keeps what it computes from it (`PromptCache`).

    Args:
        batch: the prompt whose first samples these are, if it is a part of one; nothing is computed or kept twice.
    """

    def __init__(self, text: Tensor | TextRows, batch: Prompt | None = None) -> None:
        self.batch = batch
        self.text = without_padding(text) if isinstance(text, Tensor) else text

    def first(self, samples: int) -> Prompt:
        """The first samples of this batch."""
        return Prompt(self.text.take(slice(samples)), self)


class PromptCache:
    """A prompt in one backbone: its embedded text, and each block's cross-attention keys and values.

    A block whose k or v has an adapter is computed at every step, since its gates may change with sigma. For use
    without gradients.

    Args:
        batch: the cache whose first samples these are.
    """

    def __init__(self, text: TextRows, batch: PromptCache | None = None) -> None:
        self.text, self._batch = text, batch
        self._keys_values: dict[int, KeysValues] = {}

    def first(self, samples: int) -> PromptCache:
        """The first samples of this batch."""
        return PromptCache(self.text.take(slice(samples)), self)

    def keys_values(self, index: int, block: Any) -> KeysValues | None:
        """Keys and values of block `index`; None if they may change."""
        if self._batch is not None:
            both, count = self._batch.keys_values(index, block), len(self.text.rows_BMD)
            return None if both is None else (both[0][:count], both[1][:count])
        if isinstance(block.attn2.to_k, StackedLoraLinear) or isinstance(block.attn2.to_v, StackedLoraLinear):
            return None
        if index not in self._keys_values:
            self._keys_values[index] = text_keys_values(block.attn2, self.text.rows_BMD)
        return self.text.repeated(self._keys_values[index])


def padded_rows(text: Tensor | Sequence[Tensor], keep_padding: bool) -> TextRows:
    """A text, or each sample's without padding, as rows for the text embedder.

    Args:
        keep_padding: keep all rows, because dropout draws for each of them. (Only a text on a CPU is ever folded.)
    """
    if not isinstance(text, Tensor):
        longest = max(len(features) for features in text)
        if text[0].device.type != "cpu" and longest < TEXT_LENGTH:
            return TextRows(pad_text(text, longest + 1), None, TEXT_LENGTH - longest)
        text = pad_text(text)
    return TextRows(text) if keep_padding else TextRows(*fold_padding(text))


def without_padding(text_BLD: Tensor) -> TextRows:
    """A padded text, folded if it can be, else trimmed. Synchronises with the device."""
    folded, bias = fold_padding(text_BLD)
    return TextRows(*trim_padding(text_BLD)) if bias is None else TextRows(folded, bias)


def fold_padding(text_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    """The text without most of its padding, and what to add to the logits [B, 1, 1, M]; None if nothing is folded.

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


def trim_padding(text_BLD: Tensor) -> tuple[Tensor, None, int]:
    """The text up to its first row of padding, no bias, and how many rows that one represents.

    Synchronises with the device.
    """
    if type(text_BLD) is not Tensor or text_BLD.is_meta:
        return text_BLD, None, 1
    rows = text_BLD.shape[1]
    is_text_L = text_BLD.ne(0).any(dim=2).any(dim=0)
    words = int(torch.where(is_text_L, torch.arange(1, rows + 1, device=text_BLD.device), 0).amax())
    return (text_BLD, None, 1) if words >= rows else (text_BLD[:, : words + 1], None, rows - words)


def repeat_last(x: Tensor, times: int) -> Tensor:
    """[B, M, ...] -> [B, M - 1 + times, ...]: the last row `times` times."""
    if times == 1:
        return x
    last = x[:, -1:].expand(-1, times, *x.shape[2:])
    return torch.cat([x[:, :-1], last], dim=1)
