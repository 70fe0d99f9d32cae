"""A full fine-tune spread over the processes of a run: FSDP2, started by accelerate or torchrun.

Each block's weights lie in equal parts on all processes and are put together while the block computes; gradients are
summed over the processes and stay in parts, and so do the optimizer's states. The few tensors that the model keeps in
fp32 beside its bf16 (norms, modulation: a thousandth of all) stay whole in every process, with gradients summed as a
LoRA's are: FSDP2 takes one dtype at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapwan.distributed import Processes, T, launched
from lapwan.errors import UserError
from lapwan.wan.transformer.options import forward_options

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def shard(transformer: WanTransformer3DModel, processes: int, device: torch.device) -> None:
    """Split the weights over the processes, in place; afterwards the transformer answers only when all ask at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of a view, which nothing here writes to
    forward_options(transformer).modules = True
    mesh = init_device_mesh(device.type, (processes,))
    dtype = transformer.patch_embedding.weight.dtype
    apart = {p for p in transformer.parameters() if p.dtype != dtype}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    for module in (*transformer.blocks, transformer):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=apart)
    for parameter in apart:
        parameter.data = parameter.data.to(device)
    for name, buffer in transformer.named_buffers():
        parent, _, leaf = name.rpartition(".")
        transformer.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: a step's loss is divided by the samples of all processes already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tree: Any) -> Any:
    """Plain containers with every sharded tensor put together in host memory; all processes must call it alike."""
    if isinstance(tree, Tensor) and is_sharded(tree):
        part: Any = tree.detach()
        return part.full_tensor().to("cpu", copy=True)  # a copy waits for what is still under way
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, as `parameter` is split; of a plain parameter the tensor itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    device = parameter.to_local().device
    part: Tensor = distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements).to_local()
    return part


def as_part(value: Tensor, parameter: Tensor) -> Tensor:
    """The inverse: a part (on any device) as a sharded tensor like `parameter`, which `whole` puts together."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a plain tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it lies in parts on several processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)

class Distributed(Processes):
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


def join_processes(device: str) -> tuple[Distributed, str]:
    """The processes of this run, and this one's device; the launcher's environment says both.

    Raises:
        UserError: a launcher's environment that is not complete, or processes that have not a GPU each.
    """
    found = launched()
    if found.count == 1:
        return Distributed(), device
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
    distributed = Distributed(found.rank, found.count, found.local)
    distributed.join("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return distributed, own
