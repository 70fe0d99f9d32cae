"""Fused operations for a forward without gradients on a GPU, each with its form in torch, which runs elsewhere.

Norms with the residual addition before them and the quantisation to fp8 after them; RMSNorm with rope; gelu fused into
the product before it, or with the quantisation after it. On an H200 at 5,376 tokens the compiler's kernels besides
products and attention take 0.9 of an fp8 block's 4.5 ms, three times what reading and writing their tensors once takes:
they go over rows several times.
Rows of modulation are 1 for all tokens, one per sample, or two per sample (or for all of them): the first for the first
`first` of its `tokens` tokens, the second for the others.
Shapes: N tokens of all samples, D width, H heads of d, R rows of modulation, I in features, O out features.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lapwan import console
from lapwan.wan.quantise.linears import empty_codes, quantise_fp8


class Triton:
    """Whether Triton's kernels run here. Where they do not, torch's operations run.

    Args:
        installed: it comes with torch's CUDA builds, but not on every system.
    """

    def __init__(self, installed: bool) -> None:
        self.works = installed
        self._tried = False

    def try_on(self, device: torch.device) -> None:
        """Build a kernel once on a GPU: that needs a C compiler, and a GPU that Triton supports."""
        if device.type != "cuda" or not self.works or self._tried:
            return
        self._tried = True
        try:
            from lapwan.wan.transformer import triton_kernels

            row = torch.zeros(1, 16, device=device, dtype=torch.bfloat16)
            triton_kernels.add_gated(row, row, row)
            torch.cuda.synchronize(device)
        except Exception as error:  # noqa: BLE001 - a machine may lack anything
            self.works = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            console.log(f"Triton cannot build kernels here ({reason}); torch's own operations run instead, more slowly")


TRITON = Triton(find_spec("triton") is not None)


@torch.library.custom_op("lapwan::linear_gelu", mutates_args=())
def linear_gelu(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """gelu(x Wᵀ + b), the tanh approximation; on a GPU in the epilogue of the product, before it rounds."""
    if x_NI.device.type == "cuda":
        return torch._addmm_activation(bias_O, x_NI, weight_OI.t(), use_gelu=True)
    return F.gelu(F.linear(x_NI, weight_OI, bias_O), approximate="tanh")


@linear_gelu.register_fake
def _(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("lapwan::gelu_quantise", mutates_args=())
def gelu_quantise(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [N, K] of gelu(x) (the tanh approximation) and their scales [N, 1] = amax of the row / 448."""
    if x_NK.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.gelu_quantise(x_NK.contiguous())
    return quantise_fp8(F.gelu(x_NK.float(), approximate="tanh"))


@gelu_quantise.register_fake
def _(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    return empty_codes(x_NK)


def _per_token(rows_RD: Tensor, count: int, tokens: int, first: int) -> Tensor:
    """The row of each of `count` tokens, [N, D] or [1, D]."""
    if len(rows_RD) == 1:
        return rows_RD
    if not first:
        return rows_RD.repeat_interleave(count // len(rows_RD), dim=0)
    rows_SND = rows_RD.view(-1, 2, rows_RD.shape[1])[:, (torch.arange(tokens, device=rows_RD.device) >= first).long()]
    return rows_SND.flatten(0, 1).repeat(count // (len(rows_SND) * tokens), 1)


@torch.library.custom_op("lapwan::add_norm", mutates_args=())
def add_norm(
    x_ND: Tensor, out_ND: Tensor | None, gate_RD: Tensor | None, mul_RD: Tensor, add_RD: Tensor, eps: float,
    to_fp8: bool, tokens: int = 0, first: int = 0,
) -> list[Tensor]:
    """h = x + out · gate (h = x without `out`), y = LayerNorm(h) · mul + add.

    Args:
        tokens: of a sample; read with `first` only.
        first: how many of them have the first row of each pair; 0: a row for all tokens, or one per sample.

    Returns:
        h, if `out` is given; then y in x's dtype, or with `to_fp8` its e4m3 codes and their scales [N, 1].
    """
    if x_ND.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.add_norm(x_ND, out_ND, gate_RD, mul_RD, add_RD, eps, to_fp8, tokens, first)
    wide, runs = torch.promote_types(x_ND.dtype, torch.float32), (len(x_ND), tokens, first)
    h = x_ND
    if out_ND is not None:
        gated = out_ND if gate_RD is None else out_ND.to(wide) * _per_token(gate_RD, *runs)
        h = (x_ND.to(wide) + gated).to(x_ND.dtype)
    normed = F.layer_norm(h.to(wide), h.shape[-1:], eps=eps)
    y = (normed * _per_token(mul_RD, *runs) + _per_token(add_RD, *runs)).to(h.dtype)
    return [*([] if out_ND is None else [h]), *(quantise_fp8(y) if to_fp8 else [y])]


@add_norm.register_fake
def _(x_ND: Tensor, out_ND: Tensor | None, gate_RD: Tensor | None, mul_RD: Tensor, add_RD: Tensor, eps: float,
      to_fp8: bool, tokens: int = 0, first: int = 0) -> list[Tensor]:
    h = [] if out_ND is None else [x_ND.new_empty(x_ND.shape)]
    if not to_fp8:
        return [*h, x_ND.new_empty(x_ND.shape)]
    return [*h, *empty_codes(x_ND)]


@torch.library.custom_op("lapwan::add_gated", mutates_args=())
def add_gated(x_ND: Tensor, out_ND: Tensor, gate_RD: Tensor, tokens: int = 0, first: int = 0) -> Tensor:
    """x + out · gate in one kernel, whether or not the block is compiled; rows as in `add_norm`."""
    if x_ND.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.add_gated(x_ND, out_ND, gate_RD, tokens, first)
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return (x_ND.to(wide) + out_ND.to(wide) * _per_token(gate_RD, len(x_ND), tokens, first)).to(x_ND.dtype)


@add_gated.register_fake
def _(x_ND: Tensor, out_ND: Tensor, gate_RD: Tensor, tokens: int = 0, first: int = 0) -> Tensor:
    return x_ND.new_empty(x_ND.shape)


@torch.library.custom_op("lapwan::quantise_rows", mutates_args=())
def quantise_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [N, D] and scales [N, 1] of x, as `quantise_fp8` gives them."""
    if x_ND.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.quantise_rows(x_ND.contiguous())
    return quantise_fp8(x_ND)


@quantise_rows.register_fake
def _(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    return empty_codes(x_ND)


def rotate(x_BNHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(a, b) -> (a·cos − b·sin, b·cos + a·sin) on neighbouring pairs, as x·C + swapped(x)·S with tables [N, 1, d]."""
    cos, signed_sin = rope
    swapped = torch.unflatten(x_BNHd, -1, (-1, 2)).flip(-1).flatten(-2)
    return (x_BNHd * cos + swapped * signed_sin).to(x_BNHd.dtype)


@torch.library.custom_op("lapwan::rms_rotate", mutates_args=())
def rms_rotate(
    x_ND: Tensor, weight_D: Tensor, cos_Nd: Tensor | None, signed_sin_Nd: Tensor | None, eps: float
) -> Tensor:
    """RMSNorm(x) · weight over D; then (a, b) -> (a·cos − b·sin, b·cos + a·sin) on neighbours in each head.

    The tables have one row per token of a sample; the samples in x follow each other.
    """
    if x_ND.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.rms_rotate(x_ND.contiguous(), weight_D, cos_Nd, signed_sin_Nd, eps)
    y = F.rms_norm(x_ND, x_ND.shape[-1:], weight_D.to(x_ND.dtype), eps)
    if cos_Nd is None or signed_sin_Nd is None:
        return y
    heads_BNHd = y.view(-1, len(cos_Nd), x_ND.shape[-1] // cos_Nd.shape[-1], cos_Nd.shape[-1])
    return rotate(heads_BNHd, (cos_Nd.unsqueeze(1), signed_sin_Nd.unsqueeze(1))).view(x_ND.shape)


@rms_rotate.register_fake
def _(x_ND: Tensor, weight_D: Tensor, cos_Nd: Tensor | None, signed_sin_Nd: Tensor | None, eps: float) -> Tensor:
    return x_ND.new_empty(x_ND.shape)


def supports(x: Tensor) -> bool:
    """Whether the fused operations apply to x: no graph, bf16, a GPU."""
    device = x.is_cuda or x.is_meta  # the memory plan traces a GPU's forward on meta tensors
    return device and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def plain_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear itself, with a bias."""
    return type(module) is nn.Linear and module.bias is not None
