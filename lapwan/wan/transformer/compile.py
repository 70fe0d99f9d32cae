"""Blocks through torch.compile: when it pays, and how long it took.

One compiled function serves every block: blocks of one structure share a graph, whatever their weights. Structures are
few (frozen, with adapters, with and without cached text); each size of latents adds its own, since shapes are static.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lapwan import console
from lapwan.files import cache_root
from lapwan.wan.transformer import kernels
from lapwan.wan.transformer.block import block_forward
from lapwan.wan.transformer.options import BlockFunction, forward_options, selective_block

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Compile = Literal["auto", "on", "off"]

# Beyond torch's own 8: a run may visit many buckets, each with a frozen, a trained and a sampling structure.
_GRAPHS = 128
# Measured on an H200 at A14B's width: compiled blocks save 14 µs a token and evaluation where our kernels do not serve,
# 20 µs a token in a step of a LoRA on the last eight. Without a cache compiling took 3 s for a forward there, 12 to
# 17 s for a step.
_COLD_SECONDS = 15.0
_EVALUATION_SAVES, _STEP_SAVES = 14e-6 / 5120, 20e-6 / 5120


def pays(transformer: WanTransformer3DModel, latents_THW: Sequence[int], times: int, training: bool) -> bool:
    """Whether `times` evaluations (or training steps) at this size save more than compiling takes; never on a CPU.

    Where our own kernels serve an evaluation, compiling it saves nothing: 0.255 s compiled or not on an H200 in bf16,
    0.171 and 0.170 in fp8 (256x256, 81 frames; a model whose tokens have times of their own is not served).
    """
    weight = transformer.patch_embedding.weight
    if not training and kernels.HAS_TRITON and weight.dtype == torch.bfloat16:
        return False
    # Of a noise expert that waits in host memory, only what is trained is there.
    if not any(p.device.type == "cuda" for p in transformer.parameters()):
        return False
    tokens = math.prod(latents_THW) // math.prod(transformer.config.patch_size)
    return worth(weight.shape[0], tokens, times, training)


def worth(width: int, tokens: int, times: int, training: bool) -> bool:
    """The same from numbers alone, for a GPU."""
    return times * tokens * width * (_STEP_SAVES if training else _EVALUATION_SAVES) > _COLD_SECONDS


class _Clock:
    """Seconds that torch spent compiling, and how many graphs: its own callbacks tell, also from a backward pass."""

    def __init__(self) -> None:
        self.seconds, self.graphs, self._depth, self._start = 0.0, 0, 0, 0.0

    def begin(self, _: Any) -> None:
        if not self._depth:
            self._start = time.monotonic()
        self._depth += 1

    def end(self, _: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.monotonic() - self._start
            self.graphs += 1


_CLOCK = _Clock()
_COMPILED: dict[str, BlockFunction] = {}


def compiled_block(selective: bool = False) -> BlockFunction:
    """`block_forward` compiled, or `selective_block`: one function for all transformers of the process, made once."""
    if not _COMPILED:
        import torch._dynamo as dynamo
        from torch._dynamo.callback import callback_handler

        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _GRAPHS)
        dynamo.config.accumulated_recompile_limit = max(dynamo.config.accumulated_recompile_limit, 4 * _GRAPHS)
        callback_handler.register_start_callback(_CLOCK.begin)
        callback_handler.register_end_callback(_CLOCK.end)
        # It asks not to work in place where operations are chosen for recomputation: nothing in a block does.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for name, function in (("block", block_forward), ("selective", selective_block)):
            _COMPILED[name] = torch.compile(function, dynamic=False, fullgraph=True)
    return _COMPILED["selective" if selective else "block"]


def compile_blocks(transformer: nn.Module, on: bool = True) -> None:
    """Run this transformer's blocks compiled (or not) from now on. Nothing is compiled before their first use."""
    path = forward_options(transformer)
    path.block = compiled_block() if on else block_forward
    path.selective = compiled_block(selective=True) if on else None


def compile_time() -> tuple[float, int]:
    """Seconds spent compiling in this process so far, and graphs made or read from the cache."""
    return _CLOCK.seconds, _CLOCK.graphs


class CompileReport:
    """Says how long compiling took: at each call, what is new since the last."""

    def __init__(self) -> None:
        self._told = compile_time()

    def tell(self) -> None:
        """Log new compilations, if there are any."""
        seconds, graphs = compile_time()
        if graphs != self._told[1]:
            console.log(f"compiled {graphs - self._told[1]} kinds of block in {seconds - self._told[0]:.1f} s "
                        f"(kept in {os.environ['TORCHINDUCTOR_CACHE_DIR']})")
            self._told = seconds, graphs
