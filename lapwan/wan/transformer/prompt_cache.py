"""A prompt's embedded text and cross-attention keys and values, kept over the steps of a generation.

Shapes: B samples, L rows of text, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor, nn

from lapwan.lora.layer import StackedLoraLinear
from lapwan.wan.transformer.block import KeysValues, text_keys_values
from lapwan.wan.transformer.text_padding import fold_padding, repeat_last, trim_padding

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


class PromptCache:
    """A generation's text, embedded once per transformer, with each block's cross-attention keys and values.

    A block whose k or v has an adapter is computed at every step, since its gates may change with sigma.
    Only the last transformer's tensors are kept. For use without gradients.
    """

    def __init__(self, text_BLD: Tensor, batch: PromptCache | None = None) -> None:
        self.text_BLD, self.bias = (text_BLD, None) if batch is not None else fold_padding(text_BLD)
        self.last_row_count = 1  # rows of the padded text that the last row represents
        if batch is not None:
            self.bias = None if batch.bias is None else batch.bias[: len(text_BLD)]
            self.last_row_count = batch.last_row_count
        elif self.bias is None:
            self.text_BLD, self.last_row_count = trim_padding(text_BLD)
        self._batch = batch  # the cache whose first samples these are
        self._transformer: Callable[[], nn.Module | None] = lambda: None
        self._embedded: Tensor | None = None
        self._keys_values: dict[int, KeysValues] = {}

    def first(self, samples: int) -> PromptCache:
        """The first samples of this batch; nothing is computed or kept twice."""
        return PromptCache(self.text_BLD[:samples], self)

    def embedded(self, transformer: WanTransformer3DModel) -> Tensor:
        """The text after the transformer's text embedder."""
        if self._batch is not None:
            return self._batch.embedded(transformer)[: len(self.text_BLD)]
        if self._transformer() is not transformer or self._embedded is None:
            self._keys_values.clear()
            self._transformer = ref(transformer)
            dtype = transformer.patch_embedding.weight.dtype
            self._embedded = transformer.condition_embedder.text_embedder(self.text_BLD.to(dtype))
        return self._embedded

    def keys_values(self, index: int, block: Any) -> KeysValues | None:
        """Keys and values of a block of the transformer given last to `embedded`; None if they may change."""
        if self._batch is not None:
            both, count = self._batch.keys_values(index, block), len(self.text_BLD)
            return None if both is None else (both[0][:count], both[1][:count])
        if isinstance(block.attn2.to_k, StackedLoraLinear) or isinstance(block.attn2.to_v, StackedLoraLinear):
            return None
        if index not in self._keys_values:
            assert self._embedded is not None
            self._keys_values[index] = text_keys_values(block.attn2, self._embedded)
        k, v = self._keys_values[index]
        return repeat_last(k, self.last_row_count), repeat_last(v, self.last_row_count)
