"""Several processes on one piece of work (accelerate launch, torchrun): who takes what, and waiting for each other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world`; `local` is its number on this machine, and so its GPU."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """The process that plans aloud, holds the lock and writes the index."""
        return self.rank == 0

    def take(self, items: Iterable[T]) -> list[T]:
        """Every `world`-th item: equal shares of work sorted by size."""
        return [item for position, item in enumerate(items) if position % self.world == self.rank]

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, in every process."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo")
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def close(self) -> None:
        """Leave the group, so that the launcher sees a clean end."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


def shard_of_environment() -> Shard:
    """What the launcher said in RANK, WORLD_SIZE and LOCAL_RANK; one process without a launcher."""
    return Shard(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)),
                 int(os.environ.get("LOCAL_RANK", 0)))
