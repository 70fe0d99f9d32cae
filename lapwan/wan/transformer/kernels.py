"""Where the compiler leaves time on the table, in a forward without gradients on a GPU: norms with the residual before
them and the rounding to fp8 after them, RMSNorm with rope, gelu in the product before it or with the rounding after it.

On an H200 at 5,376 tokens the compiler's kernels beside products and attention take 0.9 of an fp8 block's 4.5 ms, three
times what reading and writing their tensors once takes: they go over rows several times. Each operation here has its
torch form, which is what runs elsewhere.
Shapes: N tokens of all samples, D width, H heads of d, R rows of modulation (1, or one a sample), I in features, O out.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lapwan import console
from lapwan.wan.quantise.linears import empty_codes, quantise_fp8

ENABLED = True  # off in tests, to compare
HAS_TRITON = find_spec("triton") is not None  # comes with torch's CUDA builds, but not on every system
_TRIED = False


def prepare(device: torch.device) -> None:
    """Try Triton once on a GPU: it needs a C compiler there, and a GPU that it knows. Else torch's operations run."""
    global HAS_TRITON, _TRIED
    if device.type != "cuda" or not HAS_TRITON or _TRIED:
        return
    _TRIED = True
    try:
        from lapwan.wan.transformer import triton_kernels

        row = torch.zeros(1, 16, device=device, dtype=torch.bfloat16)
        triton_kernels.add_gated(row, row, row)
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001 - whatever a machine lacks
        HAS_TRITON = False
        said = (str(error).splitlines() or [type(error).__name__])[0]
        console.log(f"Triton cannot build kernels here ({said}); torch's own operations run instead, more slowly")


@torch.library.custom_op("lapwan::linear_gelu", mutates_args=())
def linear_gelu(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """gelu(x Wᵀ + b), the tanh approximation; on a GPU within the product's kernel, before it rounds."""
    if x_NI.device.type == "cuda":
        return torch._addmm_activation(bias_O, x_NI, weight_OI.t(), use_gelu=True)
    return F.gelu(F.linear(x_NI, weight_OI, bias_O), approximate="tanh")


@linear_gelu.register_fake
def _(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("lapwan::gelu_quantise", mutates_args=())
def gelu_quantise(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [N, K] of gelu(x) (the tanh approximation) and their scales [N, 1], amax of a row / 448."""
    if x_NK.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.gelu_quantise(x_NK.contiguous())
    return quantise_fp8(F.gelu(x_NK.float(), approximate="tanh"))


@gelu_quantise.register_fake
def _(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    return empty_codes(x_NK)


def _of_samples(rows_RD: Tensor, tokens: int) -> Tensor:
    return rows_RD.repeat_interleave(tokens // rows_RD.shape[0], dim=0)


@torch.library.custom_op("lapwan::add_norm", mutates_args=())
def add_norm(
    x_ND: Tensor, out_ND: Tensor | None, gate_RD: Tensor | None, mul_RD: Tensor, add_RD: Tensor, eps: float, eight: bool
) -> list[Tensor]:
    """h = x + out · gate (where there is an `out`), y = LayerNorm(h) · mul + add.

    Returns:
        h first, where there is an `out`; then y in x's dtype, or its e4m3 codes and their scales [N, 1].
    """
    if x_ND.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.add_norm(x_ND, out_ND, gate_RD, mul_RD, add_RD, eps, eight)
    wide, tokens = torch.promote_types(x_ND.dtype, torch.float32), len(x_ND)
    h = x_ND
    if out_ND is not None:
        gated = out_ND if gate_RD is None else out_ND.to(wide) * _of_samples(gate_RD, tokens)
        h = (x_ND.to(wide) + gated).to(x_ND.dtype)
    normed = F.layer_norm(h.to(wide), h.shape[-1:], eps=eps)
    y = (normed * _of_samples(mul_RD, tokens) + _of_samples(add_RD, tokens)).to(h.dtype)
    return [*([] if out_ND is None else [h]), *(quantise_fp8(y) if eight else [y])]


@add_norm.register_fake
def _(x_ND: Tensor, out_ND: Tensor | None, gate_RD: Tensor | None, mul_RD: Tensor, add_RD: Tensor, eps: float,
      eight: bool) -> list[Tensor]:
    found = [] if out_ND is None else [x_ND.new_empty(x_ND.shape)]
    if not eight:
        return [*found, x_ND.new_empty(x_ND.shape)]
    return [*found, *empty_codes(x_ND)]


@torch.library.custom_op("lapwan::add_gated", mutates_args=())
def add_gated(x_ND: Tensor, out_ND: Tensor, gate_RD: Tensor) -> Tensor:
    """x + out · gate, in one pass also where nothing is compiled."""
    if x_ND.device.type == "cuda":
        from lapwan.wan.transformer import triton_kernels

        return triton_kernels.add_gated(x_ND, out_ND, gate_RD)
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return (x_ND.to(wide) + out_ND.to(wide) * _of_samples(gate_RD, len(x_ND))).to(x_ND.dtype)


@add_gated.register_fake
def _(x_ND: Tensor, out_ND: Tensor, gate_RD: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape)


@torch.library.custom_op("lapwan::quantise_rows", mutates_args=())
def quantise_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [N, D] and scales [N, 1] of x: what `precision.quantise_fp8` gives."""
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

    The tables have a row a token of one sample; samples follow each other.
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


def serves(x: Tensor) -> bool:
    """Whether these take part: no graph to keep, half precision, a GPU."""
    device = x.is_cuda or x.is_meta  # shapes alone stand for a GPU's
    return ENABLED and device and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def plain_linear(module: nn.Module) -> bool:
    """A Linear with a bias, and nothing else."""
    return type(module) is nn.Linear and module.bias is not None
