"""Clips whose tokens several processes share, for clips that are too long for one (`divide = "tokens"`).

Each process takes every batch and computes a part of each clip's tokens (`wan.spread`); losses, routers and what else
comes after the velocity all have whole. Each takes 1/P of the loss backward, and the sum of the gradients over the P
processes is that of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from lapwan import console
from lapwan.distributed import T
from lapwan.errors import UserError
from lapwan.memory.shapes import heads_of
from lapwan.models.base import Base
from lapwan.settings.train import TrainSettings
from lapwan.train.parallel import Distributed
from lapwan.wan.transformer.context_parallel import ContextParallel, check_heads
from lapwan.wan.transformer.options import forward_options


class SharedClips(Distributed):
    """Processes that share the tokens of every clip."""

    @property
    def copies(self) -> int:
        return self.count

    def own(self, items: Iterable[T]) -> list[T]:
        return list(items)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def figures(self, value: T) -> list[T]:
        return [self.from_first(value)]

    def alike(self, value: T) -> T:
        return self.from_first(value)


def divided(settings: TrainSettings, base: Base, distributed: Distributed) -> Distributed:
    """The processes, as `divide` says what they share.

    Raises:
        UserError: heads that do not divide among them, or dropout that draws for every token.
    """
    if settings.divide == "batches" or distributed.count == 1:
        return distributed
    check_heads(heads_of(base.spec), distributed.count)
    for noise_expert in settings.noise_experts:
        if settings.of(noise_expert, 1).dropout.neuron:
            raise UserError("dropout.neuron draws for all tokens of a clip, of which divide = \"tokens\" gives each "
                            "process a part; use dropout.rank or dropout.module, or divide = \"batches\"")
    console.log(f"{distributed.count} processes share the tokens of each clip")
    return SharedClips(distributed.rank, distributed.count, distributed.local)


def share(transformers: Iterable[nn.Module], distributed: SharedClips) -> Callable[[], AbstractContextManager[None]]:
    """Let these transformers share each sequence; what is returned is a scope in which a process asks them alone."""
    paths = [forward_options(transformer) for transformer in transformers]

    def put(spread: ContextParallel | None) -> None:
        for path in paths:
            path.spread = spread

    @contextmanager
    def alone() -> Iterator[None]:
        put(None)
        try:
            yield
        finally:
            put(ContextParallel(distributed.rank, distributed.count))

    put(ContextParallel(distributed.rank, distributed.count))
    return alone
