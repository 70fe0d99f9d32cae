"""Several processes as one run, started by torchrun or accelerate: the batches of a step are dealt out among them.

A step is the same however many processes share it: its batches and draws follow from the settings, each process takes
every n-th batch, and one all-reduce of one bucket adds the gradients up. Decisions (a dropped step, a stop) follow from
reduced numbers, so that all processes take them alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapwan.errors import UserError

_PATIENCE = timedelta(hours=2)  # the others wait while the first process validates, samples or saves


class Ranks:
    """This process among the run's; alone by default."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """True in the one process that writes files and talks."""
        return self.rank == 0

    def own(self, batches: Sequence[Any]) -> list[Any]:
        """This process's part of a step's batches."""
        return list(batches[self.rank :: self.count])

    def sum(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over the processes."""
        if self.count > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes, in one bucket.

        A gradient that no process has stays None; one that only some have counts as 0 in the others.
        """
        if self.count == 1 or not parameters:
            return
        present = [float(p.grad is not None) for p in parameters]
        wide = torch.promote_types(parameters[0].dtype, torch.float32)
        parts = [torch.tensor(present, dtype=wide, device=parameters[0].device)]
        parts += [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(wide) for p in parameters]
        bucket = torch.cat(parts)
        dist.all_reduce(bucket)
        held, *gradients = torch.split(bucket, [len(parameters), *(p.numel() for p in parameters)])
        for parameter, has, gradient in zip(parameters, held.tolist(), gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if has else None

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """The first process's value, everywhere."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        return flag if self.count == 1 else any(self.gather(flag))

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            dist.destroy_process_group()


def join_ranks(device: str) -> tuple[Ranks, str]:
    """The processes of this run, and this one's device; the launcher's environment says both.

    Raises:
        UserError: a launcher's environment that is not complete.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count <= 1:
        return Ranks(), device
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE = {count}, but {', '.join(missing)} is not set; start with torchrun or "
                        "accelerate, or unset WORLD_SIZE")
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else device
    if gpu:
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
    return Ranks(int(os.environ["RANK"]), count), own
