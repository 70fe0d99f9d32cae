"""Quantised frozen Linears: fp8 for weights and inputs, int8 and nf4 for weights only.

    fp8   W̃ = s_O · e4m3(W / s_O),  s = amax of the row / 448;  inputs likewise, a scale per token;  fp32 accumulation
    int8  W̃ = s_O · round(W / s_O), s = amax of the row / 127
    nf4   W̃ = s · code[q],          s = amax of 64 neighbours in a row, in bf16; 16 codes, 4.25 bits a weight

Codes are rounded to nearest, and scales are computed from the weights as stored, so that every device gives the same
bytes. Backward: grad_x = grad_y · W̃, with W̃ dequantised again from the codes (as in QLoRA, arXiv 2305.14314): nothing
as large as an unquantised weight is kept between forward and backward. Rounding fp8's inputs passes gradients unchanged
(straight-through).

Why not torchao (0.18 was tried): its 4-bit layouts need kernels that exist for some GPUs only, a layout for each; its
nf4 tensor is gone; and at the thousands of tokens of a video every weight-only product is a dequantisation and a
plain matrix product anyway. Here one format works on every device, for streaming, the file cache and the backward.

Shapes: O out features, I in features, N tokens, J groups of 64 in a row.

How to add a precision: a member of `names.Precision`, a subclass of `QuantisedLinear`, a row in `LINEAR_CLASSES`, and
its name in `TrainDtype` and `GenerateDtype` (settings/memory.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.lora.layer import FrozenLinear
from lapwan.names import Precision

_FP8, _FP8_MAX = torch.float8_e4m3fn, 448.0
_GROUP = 64  # neighbours that share an nf4 scale
_TILE = 1 << 22  # weights quantised at a time, to keep fp32 copies small; rows are independent
# The quantiles of N(0, 1) that QLoRA's appendix E gives, scaled to [-1, 1], with an exact zero.
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)


def fp8_in_hardware(device: torch.device) -> bool:
    """Whether a device multiplies fp8 matrices: NVIDIA from compute capability 8.9 on, and meta tensors."""
    if device.type == "meta":
        return True
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def _scale_of(rows: Tensor, top: float) -> Tensor:
    """amax / top over the last dimension in fp32, which stays as a dimension of 1; 1 if all are zero.

    Computed as a product with 1 / top: a GPU divides by a scalar like this, a CPU does not; the bytes must be equal.
    """
    amax = rows.abs().amax(dim=-1, keepdim=True).float()
    return torch.where(amax > 0, amax * (1.0 / top), torch.ones_like(amax))


def quantise_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> (e4m3 [..., K], scale [..., 1] fp32): rows ≈ codes · scale."""
    scale = _scale_of(rows, _FP8_MAX)
    # e4m3 has no infinity: a quotient that rounds above 448 would become NaN.
    return (rows.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale


def empty_codes(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the e4m3 codes of x and their scales [N, 1]."""
    return x_ND.new_empty(x_ND.shape, dtype=_FP8), x_ND.new_empty((len(x_ND), 1), dtype=torch.float32)


def quantise_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> (int8 [..., K], scale [..., 1] fp32)."""
    scale = _scale_of(rows, 127.0)
    return (rows.float() / scale).round().to(torch.int8), scale


def quantise_nf4(rows_OI: Tensor) -> tuple[Tensor, Tensor]:
    """[O, I] -> (uint8 [O, I/2], even columns in the high four bits; bf16 scale [O, J])."""
    groups_OJG = torch.unflatten(rows_OI.float(), -1, (-1, _GROUP))
    scale = _scale_of(groups_OJG, 1.0).to(torch.bfloat16)
    codes = torch.tensor(NF4_CODES, device=rows_OI.device)
    edges = (codes[1:] + codes[:-1]) / 2
    index = torch.bucketize(groups_OJG / scale.float(), edges).to(torch.uint8).flatten(-2)
    return (index[..., ::2] << 4) | index[..., 1::2], scale.squeeze(-1)


def _codes_weight(dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() * scale).to(dtype)


def _nf4_weight(dtype: torch.dtype, packed_OI: Tensor, scale_OJ: Tensor, pairs: Tensor) -> Tensor:
    codes = F.embedding(packed_OI.int(), pairs)  # two codes per byte
    return (codes.view(*scale_OJ.shape, _GROUP) * scale_OJ.float().unsqueeze(-1)).to(dtype).flatten(-2)


def _fp8_product(x8_NI: Tensor, x_scale: Tensor, w8_OI: Tensor, w_scale: Tensor, bias: Tensor | None,
                 dtype: torch.dtype) -> Tensor:
    """(x8 · w8ᵀ) ∘ (s_N s_O) + b, accumulated in fp32 and rounded once; in hardware if it supports fp8."""
    if fp8_in_hardware(x8_NI.device):
        bias = None if bias is None else bias.to(torch.bfloat16)
        y = torch._scaled_mm(x8_NI, w8_OI.t(), scale_a=x_scale, scale_b=w_scale.t(), bias=bias,
                             out_dtype=torch.bfloat16, use_fast_accum=True)
        return y.to(dtype)
    if x8_NI.device.type == "cuda":  # e4m3 numbers are bf16 numbers: the products are exact
        y = torch.mm(x8_NI.bfloat16(), w8_OI.bfloat16().t(), out_dtype=torch.float32)
    else:
        wide = torch.promote_types(dtype, torch.float32)
        y = x8_NI.to(wide) @ w8_OI.to(wide).t()
    y = y * x_scale * w_scale.t()
    return (y if bias is None else y + bias).to(dtype)


def _fp8_forward(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    x8, x_scale = quantise_fp8(x.flatten(0, -2))
    return torch.unflatten(_fp8_product(x8, x_scale, codes, scale, bias, x.dtype), 0, x.shape[:-1])


def _int8_forward(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
    return F.linear(x, _codes_weight(x.dtype, codes, scale), None if bias is None else bias.to(x.dtype))


def _nf4_forward(x: Tensor, bias: Tensor | None, packed: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
    return F.linear(x, _nf4_weight(x.dtype, packed, scale, pairs), None if bias is None else bias.to(x.dtype))


class _Fp8Product(torch.autograd.Function):
    """`_fp8_forward` whose backward dequantises the weight from its codes; likewise the two classes below.

    One class per precision rather than one with functions as arguments: torch.compile can trace these.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return _fp8_forward(x, bias, codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ _codes_weight(grad.dtype, *ctx.saved_tensors), None, None, None


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return _int8_forward(x, bias, codes, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ _codes_weight(grad.dtype, *ctx.saved_tensors), None, None, None


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, scale: Tensor, pairs: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale, pairs)
        return _nf4_forward(x, bias, packed, scale, pairs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ _nf4_weight(grad.dtype, *ctx.saved_tensors), None, None, None, None


class QuantisedLinear(FrozenLinear):
    """A Linear stored as codes and scales; `from_weight` quantises."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    product: Callable[..., Tensor]
    with_gradient: type[torch.autograd.Function]
    weight_of: Callable[..., Tensor]
    bits: float  # per weight, without the scales of rows

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__(in_features, codes.shape[0])
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def supports(cls, in_features: int, out_features: int) -> bool:
        """Whether a layer of this shape can be quantised; others stay as they are."""
        return in_features % 16 == 0 and out_features % 16 == 0

    @classmethod
    def quantise_rows(cls, weight_OI: Tensor, tile: int = _TILE) -> tuple[Tensor, Tensor]:
        """Codes and scales, of about `tile` weights at a time, without an fp32 copy of the whole."""
        rows = max(1, tile // weight_OI.shape[1])
        parts = [cls.quantise(weight_OI[first : first + rows]) for first in range(0, len(weight_OI), rows)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias: Tensor | None, tile: int = _TILE) -> QuantisedLinear:
        """The layer of a weight."""
        return cls(*cls.quantise_rows(weight_OI, tile), bias, weight_OI.shape[1])

    @classmethod
    def shaped(cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> QuantisedLinear:
        """A layer on the meta device, for shapes alone."""
        meta = torch.device("meta")
        codes, scale = cls.quantise(torch.empty(out_features, in_features, device=meta))
        return cls(codes, scale, torch.empty(out_features, device=meta, dtype=dtype) if bias else None, in_features)

    def _weight(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        return type(self).weight_of(dtype, *self._weight())

    def forward(self, x: Tensor) -> Tensor:
        cls = type(self)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = cls.with_gradient.apply(x, self.bias, *self._weight())  # type: ignore[no-untyped-call]
            return y
        return cls.product(x, self.bias, *self._weight())

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class Fp8Linear(QuantisedLinear):
    """Weight and input in e4m3, scaled per row and per token; layers that share an input share its codes."""

    quantise, product, weight_of = staticmethod(quantise_fp8), staticmethod(_fp8_forward), staticmethod(_codes_weight)
    bits = 8.0
    with_gradient = _Fp8Product

    def multiply(self, x8_NI: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The product with an input quantised by `quantise_fp8`, such as the one q, k and v share. No gradient."""
        return _fp8_product(x8_NI, x_scale, self.codes, self.scale, self.bias, dtype)

    @classmethod
    def forward_many(cls, layers: Sequence[FrozenLinear], x: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled() and x.requires_grad:
            return [layer(x) for layer in layers]
        x8, x_scale = quantise_fp8(x.flatten(0, -2))
        return [torch.unflatten(layer.multiply(x8, x_scale, x.dtype), 0, x.shape[:-1])
                for layer in layers if isinstance(layer, Fp8Linear)]


class Int8Linear(QuantisedLinear):
    """Weight in int8, scaled per row; the input unquantised."""

    quantise, product, weight_of = staticmethod(quantise_int8), staticmethod(_int8_forward), staticmethod(_codes_weight)
    bits = 8.0
    with_gradient = _Int8Product


class Nf4Linear(QuantisedLinear):
    """Weight in 4-bit codes, scaled per group of 64; the input unquantised."""

    pairs: Tensor
    quantise, product, weight_of = staticmethod(quantise_nf4), staticmethod(_nf4_forward), staticmethod(_nf4_weight)
    bits = 4.25
    with_gradient = _Nf4Product

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__(codes, scale, bias, in_features)
        table = torch.tensor(NF4_CODES, device=codes.device)
        byte = torch.arange(256, device=codes.device)
        self.register_buffer("pairs", torch.stack([table[byte >> 4], table[byte & 15]], 1), persistent=False)

    @classmethod
    def supports(cls, in_features: int, out_features: int) -> bool:
        return in_features % _GROUP == 0

    def _weight(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.pairs


LINEAR_CLASSES: dict[Precision, type[QuantisedLinear]] = {
    Precision.FP8: Fp8Linear, Precision.INT8: Int8Linear, Precision.NF4: Nf4Linear,
}
# Increased when quantising gives other bytes, so that older cached ones are not read.
RECIPE_VERSION = 1
