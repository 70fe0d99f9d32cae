"""Frozen Linears in fewer bits: fp8 that multiplies as fp8, int8 and nf4 that keep the weight only.

    fp8   W̃ = s_O · e4m3(W / s_O),  s = amax of the row / 448;  inputs likewise, a scale a token;  fp32 accumulation
    int8  W̃ = s_O · round(W / s_O), s = amax of the row / 127
    nf4   W̃ = s · code[q],          s = amax of 64 neighbours in a row, in bf16; 16 codes, 4.25 bits a weight

Rounding to a code is to the nearest; scales are of the numbers as they are stored, so any device gives the same bytes.
Backward: grad_x = grad_y · W̃, with W̃ made from the codes again (as in QLoRA, arXiv 2305.14314): nothing that is as
large as an unquantised weight is kept between forward and backward. The rounding of fp8's inputs passes gradients
unchanged.

Why not torchao (0.18 was tried): its 4-bit layouts need kernels that exist for some GPUs only and are laid out for each
of them, its nf4 tensor is gone, and at the thousands of tokens of a video every weight-only product is a conversion
and a plain matrix product anyway. Here one form serves every device, streaming, the file cache and the backward pass.

Shapes: O out features, I in features, N tokens, J groups of 64 in a row. How to add a precision: a subclass and a row
in `KINDS`.
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
_TILE = 1 << 22  # weights quantised at a time: rows do not depend on each other, and fp32 copies stay small
# The quantiles of N(0, 1) that QLoRA's appendix E gives, scaled to [-1, 1], with an exact zero.
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)


def fp8_in_hardware(device: torch.device) -> bool:
    """Whether a device multiplies fp8 matrices (NVIDIA from compute capability 8.9 on; shapes alone, too)."""
    if device.type == "meta":
        return True
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def _scale_of(rows: Tensor, top: float) -> Tensor:
    """amax / top of the last dimension in fp32, kept as a dimension; 1 where all is zero.

    As a product with 1 / top: a GPU divides by a number that way, a CPU does not, and both shall give the same bytes.
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
    """[O, I] -> (uint8 [O, I/2], the even place in the high half; bf16 scale [O, J])."""
    groups_OJG = torch.unflatten(rows_OI.float(), -1, (-1, _GROUP))
    scale = _scale_of(groups_OJG, 1.0).to(torch.bfloat16)
    codes = torch.tensor(NF4_CODES, device=rows_OI.device)
    edges = (codes[1:] + codes[:-1]) / 2
    index = torch.bucketize(groups_OJG / scale.float(), edges).to(torch.uint8).flatten(-2)
    return (index[..., ::2] << 4) | index[..., 1::2], scale.squeeze(-1)


def _codes_weight(dtype: torch.dtype, codes: Tensor, scale: Tensor) -> Tensor:
    return (codes.float() * scale).to(dtype)


def _nf4_weight(dtype: torch.dtype, packed_OI: Tensor, scale_OJ: Tensor, pairs: Tensor) -> Tensor:
    codes = F.embedding(packed_OI.int(), pairs)  # two codes a byte
    return (codes.view(*scale_OJ.shape, _GROUP) * scale_OJ.float().unsqueeze(-1)).to(dtype).flatten(-2)


def _fp8_product(x8_NI: Tensor, x_scale: Tensor, w8_OI: Tensor, w_scale: Tensor, bias: Tensor | None,
                 dtype: torch.dtype) -> Tensor:
    """(x8 · w8ᵀ) ∘ (s_N s_O) + b, accumulated in fp32 and rounded once; in hardware where there is any."""
    if fp8_in_hardware(x8_NI.device):
        own = None if bias is None else bias.to(torch.bfloat16)
        y = torch._scaled_mm(x8_NI, w8_OI.t(), scale_a=x_scale, scale_b=w_scale.t(), bias=own,
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
    """`_fp8_forward` whose backward makes the weight again from its codes; likewise the two below.

    One class a precision rather than one with the functions as arguments: the compiler traces these.
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
    """Codes and scales; `from_weight` quantises."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    quantise: Callable[[Tensor], tuple[Tensor, Tensor]]
    product: Callable[..., Tensor]
    with_gradient: type[torch.autograd.Function]
    weight_of: Callable[..., Tensor]
    bits: float  # a weight, scales of a row not counted

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__(in_features, codes.shape[0])
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def serves(cls, in_features: int, out_features: int) -> bool:
        """Whether a layer of this shape can take the form; others stay as they are."""
        return in_features % 16 == 0 and out_features % 16 == 0

    @classmethod
    def from_weight(cls, weight_OI: Tensor, bias: Tensor | None) -> QuantisedLinear:
        """Quantise, in tiles of rows: no fp32 copy of the whole weight is made."""
        rows = max(1, _TILE // weight_OI.shape[1])
        parts = [cls.quantise(weight_OI[first : first + rows]) for first in range(0, len(weight_OI), rows)]
        return cls(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), bias, weight_OI.shape[1])

    @classmethod
    def shaped(cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> QuantisedLinear:
        """One without values, for what only asks for shapes."""
        meta = torch.device("meta")
        codes, scale = cls.quantise(torch.empty(out_features, in_features, device=meta))
        return cls(codes, scale, torch.empty(out_features, device=meta, dtype=dtype) if bias else None, in_features)

    def _weight(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        return type(self).weight_of(dtype, *self._weight())

    def forward(self, x: Tensor) -> Tensor:
        kind = type(self)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = kind.with_gradient.apply(x, self.bias, *self._weight())  # type: ignore[no-untyped-call]
            return y
        return kind.product(x, self.bias, *self._weight())

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class Fp8Linear(QuantisedLinear):
    """Weight and input in e4m3, scaled by row and by token; `quantise_input` of [N, I] serves layers that share it."""

    quantise, product, weight_of = staticmethod(quantise_fp8), staticmethod(_fp8_forward), staticmethod(_codes_weight)
    bits = 8.0
    with_gradient = _Fp8Product

    quantise_input = staticmethod(quantise_fp8)

    def multiply(self, x8_NI: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The product for an input that `quantise_fp8` has quantised: q, k and v share theirs. No gradient."""
        return _fp8_product(x8_NI, x_scale, self.codes, self.scale, self.bias, dtype)

    @classmethod
    def together(cls, layers: Sequence[FrozenLinear], x: Tensor) -> list[Tensor]:
        if torch.is_grad_enabled() and x.requires_grad:
            return [layer(x) for layer in layers]
        x8, x_scale = quantise_fp8(x.flatten(0, -2))
        return [torch.unflatten(layer.multiply(x8, x_scale, x.dtype), 0, x.shape[:-1])
                for layer in layers if isinstance(layer, Fp8Linear)]


class Int8Linear(QuantisedLinear):
    """Weight in int8, scaled by row; the input as it is."""

    quantise, product, weight_of = staticmethod(quantise_int8), staticmethod(_int8_forward), staticmethod(_codes_weight)
    bits = 8.0
    with_gradient = _Int8Product


class Nf4Linear(QuantisedLinear):
    """Weight in 4-bit codes, scaled by 64; the input as it is."""

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
    def serves(cls, in_features: int, out_features: int) -> bool:
        return in_features % _GROUP == 0

    def _weight(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.pairs


KINDS: dict[Precision, type[QuantisedLinear]] = {
    Precision.FP8: Fp8Linear, Precision.INT8: Int8Linear, Precision.NF4: Nf4Linear,
}
# Counted up when the bytes that quantising gives change, so that no cache of older ones is read.
RECIPE_VERSION = 1
