"""Blocks under torch.compile: when it is worth its time, and how long it took.

All blocks share one compiled function: blocks of the same structure share a graph, whatever their weights. There are
few structures (frozen, with adapters, with and without cached text); each size of latents adds graphs, since shapes are
static.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lapwan import console
from lapwan.files import cache_root
from lapwan.wan.transformer.block import BlockFunction, block_forward
from lapwan.wan.transformer.checkpointing import selective_block
from lapwan.wan.transformer.kernels import TRITON, Triton

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Compile = Literal["auto", "on", "off"]

# Beyond torch's own 8: a run may visit many buckets, each with a frozen, a trained and a sampling structure.
_GRAPHS = 128
# Measured on an H200 at A14B's width: compiled blocks save 14 µs per token and evaluation where the fused blocks do not
# run, 20 µs per token in a training step of a LoRA on the last eight blocks. Without a cache, compiling took 3 s for a
# forward, 12 to 17 s for a step.
_COMPILE_SECONDS = 15.0
_EVALUATION_SAVING, _STEP_SAVING = 14e-6 / 5120, 20e-6 / 5120


def worth_compiling(
    transformer: WanTransformer3DModel, latents_THW: Sequence[int], times: int, training: bool, triton: Triton = TRITON
) -> bool:
    """Whether `times` evaluations (or training steps) at this size save more than compiling takes; never on a CPU.

    Where the fused blocks run, compiling saves nothing: an evaluation takes 0.255 s compiled or not on an H200 in bf16,
    0.171 and 0.170 s in fp8 (256x256, 81 frames). That holds for TI2V-5B's clean first frame, too.
    """
    weight = transformer.patch_embedding.weight
    if not training and triton.works and weight.dtype == torch.bfloat16:
        return False
    # Of an offloaded noise expert only the trained parameters are on the device.
    if not any(p.device.type == "cuda" for p in transformer.parameters()):
        return False
    tokens = math.prod(latents_THW) // math.prod(transformer.config.patch_size)
    return compiling_saves(weight.shape[0], tokens, times, training)


def compiling_saves(width: int, tokens: int, times: int, training: bool) -> bool:
    """The same for a GPU, from the transformer's width and the number of tokens."""
    return times * tokens * width * (_STEP_SAVING if training else _EVALUATION_SAVING) > _COMPILE_SECONDS


class CompileClock:
    """Seconds torch spent compiling and graphs it made, counted by its own callbacks, so that a backward counts too."""

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


_CLOCK = CompileClock()
_COMPILED: dict[str, BlockFunction] = {}


def compiled_block(selective: bool = False) -> BlockFunction:
    """`block_forward` (or `selective_block`) compiled; one function for all transformers of the process."""
    if not _COMPILED:
        import torch._dynamo as dynamo
        from torch._dynamo.callback import callback_handler

        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _GRAPHS)
        dynamo.config.accumulated_recompile_limit = max(dynamo.config.accumulated_recompile_limit, 4 * _GRAPHS)
        callback_handler.register_start_callback(_CLOCK.begin)
        callback_handler.register_end_callback(_CLOCK.end)
        # It warns of in-place operations under selective checkpointing; a block has none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for name, function in (("block", block_forward), ("selective", selective_block)):
            _COMPILED[name] = torch.compile(function, dynamic=False, fullgraph=True)
    return _COMPILED["selective" if selective else "block"]


def compile_time(clock: CompileClock = _CLOCK) -> tuple[float, int]:
    """Seconds spent compiling in this process so far, and graphs made or read from the cache."""
    return clock.seconds, clock.graphs


class CompileReport:
    """Logs how long compiling took: each call logs what is new since the last."""

    def __init__(self, clock: CompileClock = _CLOCK) -> None:
        self._clock, self._logged = clock, compile_time(clock)

    def log(self) -> None:
        """Log new compilations, if there are any."""
        seconds, graphs = compile_time(self._clock)
        if graphs != self._logged[1]:
            console.log(f"compiled {graphs - self._logged[1]} block graphs in {seconds - self._logged[0]:.1f} s "
                        f"(cached in {os.environ['TORCHINDUCTOR_CACHE_DIR']})")
            self._logged = seconds, graphs
