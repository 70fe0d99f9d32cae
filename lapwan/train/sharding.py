"""A full fine-tune spread over the processes of a run: FSDP2, started by accelerate or torchrun.

Each block's weights lie in equal parts on all processes and are put together while the block computes; gradients are
summed over the processes and stay in parts, and so do the optimiser's states. The few tensors that the model keeps in
fp32 beside its bf16 (norms, modulation: a thousandth of all) stay whole in every process, with gradients summed as a
LoRA's are: FSDP2 takes one dtype at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapwan.wan.fastpath import path_of

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


def shard(transformer: WanTransformer3DModel, processes: int, device: torch.device) -> None:
    """Split the weights over the processes, in place; afterwards the transformer answers only when all ask at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of a view, which nothing here writes to
    path_of(transformer).modules = True
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
