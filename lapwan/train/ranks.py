"""Several processes as one run, started by torchrun or accelerate: the batches of a step are dealt out among them.

A step is the same however many processes share it: its batches and draws follow from the settings, each process takes
every n-th batch, and one all-reduce of one bucket adds the gradients up. Decisions (a dropped step, a stop) follow from
reduced numbers, so that all processes take them alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapwan.errors import UserError
from lapwan.processes import Processes, T, launched
from lapwan.train.sharding import is_sharded, local


class Ranks(Processes):
    """The processes of a training run: what they add up."""

    @property
    def copies(self) -> int:
        """Processes that take the same loss."""
        return 1

    def figures(self, value: T) -> list[T]:
        """What the processes saw of a step, each clip once."""
        return self.gather(value)

    def alike(self, value: T) -> T:
        """A decision that processes with the same work must take alike."""
        return value

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
        if self.count > 1:
            parameters = [p for p in parameters if not is_sharded(p)]  # those are summed already
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


    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`; their norm before, over all parts of what is sharded."""
        if self.count == 1 or not any(is_sharded(p) for p in parameters):
            return nn.utils.clip_grad_norm_(parameters, limit)
        found = [(p.grad, is_sharded(p)) for p in parameters if p.grad is not None]
        split = [local(gradient).float().square().sum() for gradient, apart in found if apart]
        plain = [gradient.float().square().sum() for gradient, apart in found if not apart]
        norm = (self.sum(torch.stack(split).sum()) + sum(plain)).sqrt()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in found:
            local(gradient).mul_(factor)
        return norm


def join_ranks(device: str) -> tuple[Ranks, str]:
    """The processes of this run, and this one's device; the launcher's environment says both.

    Raises:
        UserError: a launcher's environment that is not complete, or processes that have not a GPU each.
    """
    found = launched()
    if found.count == 1:
        return Ranks(), device
    if device.startswith("cuda:"):
        raise UserError(f"device = '{device}' with {found.count} processes: each takes a GPU of its own; use auto, "
                        "cuda or cpu")
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu and found.local >= torch.cuda.device_count():
        raise UserError(f"process {found.local + 1} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                        "start as many processes, or use --device cpu")
    own = f"cuda:{found.local}" if gpu else device
    if gpu:
        torch.cuda.set_device(own)
    ranks = Ranks(found.rank, found.count, found.local)
    ranks.join("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return ranks, own
