"""A training run over several processes (torchrun, accelerate): data parallel, context parallel, and FSDP2.

Data parallel (`Distributed`): each process takes its part of a step's batches; gradients are summed in one bucket.
Context parallel (`ContextParallelProcesses`, `divide = "tokens"`): for clips too long for one device. Each process
takes every batch and computes a part of each clip's tokens (`lapwan.wan.transformer.context_parallel`); the velocity
and all that follows it are complete in every process. Each of P processes runs backward on 1/P of the loss, so that the
sum of their gradients is that of a single process.
FSDP2 (`shard`): a full fine-tune. Each block's weights are sharded and gathered while the block computes; gradients are
reduced and stay sharded, and so do the optimizer's states. The few tensors that the model keeps in fp32 beside its bf16
(norms, modulation: a thousandth of all) are replicated, with gradients summed as a LoRA's are: FSDP2 takes one dtype at
a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapwan import console
from lapwan.distributed import Processes, T, launched
from lapwan.errors import UserError
from lapwan.memory.cost import heads_of
from lapwan.models.base import Base
from lapwan.settings.train import TrainSettings
from lapwan.wan.backbone import WanBackbone
from lapwan.wan.transformer.context_parallel import ContextParallel, check_heads


class Distributed(Processes):
    """The processes of a training run under data parallelism: each has a part of a step's batches."""

    @property
    def context_parallel_size(self) -> int:
        """Processes that share each clip, and so compute the same loss."""
        return 1

    def without_context_parallel(self) -> AbstractContextManager[None]:
        """A scope in which one process can run the noise experts on its own (validation, previews)."""
        return nullcontext()

    def check_accumulate(self, accumulate: int, otherwise: str = "") -> None:
        """Refuse batches of a step that cannot be divided among the processes.

        Args:
            otherwise: what else to do, for the end of the message.

        Raises:
            UserError: `accumulate` is not a multiple of the number of processes.
        """
        if accumulate % self.count:
            raise UserError(f"accumulate = {accumulate} batches a step cannot be divided evenly among {self.count} "
                            f"processes; set it to a multiple of {self.count}{otherwise}")

    def share_tokens(self, backbones: Iterable[WanBackbone]) -> None:
        """Split every sequence of these noise experts over the processes, where the processes share clips."""

    def gather_samples(self, value: T) -> list[T]:
        """What every process logged of its samples, each sample once."""
        return self.gather(value)

    def agree(self, value: T) -> T:
        """A decision that processes with the same work must share; processes with different work keep their own."""
        return value

    def all_reduce(self, tensor: Tensor) -> Tensor:
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
            parameters = [p for p in parameters if not is_sharded(p)]  # FSDP2 has reduced those already
        if self.count == 1 or not parameters:
            return
        present = [float(p.grad is not None) for p in parameters]
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        parts = [torch.tensor(present, dtype=dtype, device=parameters[0].device)]
        parts += [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).to(dtype) for p in parameters]
        bucket = torch.cat(parts)
        dist.all_reduce(bucket)
        counts, *gradients = torch.split(bucket, [len(parameters), *(p.numel() for p in parameters)])
        for parameter, count, gradient in zip(parameters, counts.tolist(), gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None

    def clip_gradients(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `max_norm`; returns their norm before, over all shards."""
        if self.count == 1 or not any(is_sharded(p) for p in parameters):
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        gradients = [(p.grad, is_sharded(p)) for p in parameters if p.grad is not None]
        sharded = [local_tensor(gradient).float().square().sum() for gradient, split in gradients if split]
        replicated = [gradient.float().square().sum() for gradient, split in gradients if not split]
        norm = (self.all_reduce(torch.stack(sharded).sum()) + sum(replicated)).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient, _ in gradients:
            local_tensor(gradient).mul_(factor)
        return norm


def join_processes(device: str) -> tuple[Distributed, str]:
    """The processes of this run and this process's device, from the launcher's environment.

    Raises:
        UserError: the launcher's environment is incomplete, or a process has no GPU.
    """
    processes = launched()
    if processes.count == 1:
        return Distributed(), device
    if device.startswith("cuda:"):
        raise UserError(f"device = '{device}' with {processes.count} processes, each of which needs its own GPU; use "
                        "auto, cuda or cpu")
    gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if gpu and processes.local_rank >= torch.cuda.device_count():
        raise UserError(f"process {processes.local_rank + 1} on this machine has no GPU: there are "
                        f"{torch.cuda.device_count()}; start one process per GPU, or use --device cpu")
    local_device = f"cuda:{processes.local_rank}" if gpu else device
    if gpu:
        torch.cuda.set_device(local_device)
    distributed = Distributed(processes.rank, processes.count, processes.local_rank)
    distributed.join("cpu:gloo,cuda:nccl" if gpu else "gloo")
    return distributed, local_device


# Context parallel


class ContextParallelProcesses(Distributed):
    """The processes of a training run under context parallelism: they share the tokens of every clip."""

    def __init__(self, rank: int, count: int, local_rank: int = 0) -> None:
        super().__init__(rank, count, local_rank)
        self._shared: list[WanBackbone] = []

    def check_accumulate(self, accumulate: int, otherwise: str = "") -> None:
        """Every process takes all batches of a step."""

    def share_tokens(self, backbones: Iterable[WanBackbone]) -> None:
        self._shared += backbones
        self._set(ContextParallel(self.rank, self.count))

    def _set(self, context_parallel: ContextParallel | None) -> None:
        for backbone in self._shared:
            backbone.share_tokens(context_parallel)

    @contextmanager
    def without_context_parallel(self) -> Iterator[None]:
        self._set(None)
        try:
            yield
        finally:
            self._set(ContextParallel(self.rank, self.count))

    @property
    def context_parallel_size(self) -> int:
        return self.count

    def local_items(self, items: Iterable[T]) -> list[T]:
        return list(items)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Every process has seen all samples: its sum is the sum."""
        return tensor

    def gather_samples(self, value: T) -> list[T]:
        return [self.from_first(value)]

    def agree(self, value: T) -> T:
        return self.from_first(value)


def choose_parallelism(settings: TrainSettings, base: Base, distributed: Distributed) -> Distributed:
    """The processes as `divide` asks: data parallel over batches, or context parallel over tokens.

    Raises:
        UserError: attention heads that cannot be divided among the processes, or dropout that draws for every token.
    """
    if settings.divide == "batches" or distributed.count == 1:
        return distributed
    check_heads(heads_of(base.spec), distributed.count)
    for noise_expert in settings.noise_experts:
        if settings.of(noise_expert, 1).dropout.neuron:
            raise UserError("dropout.neuron draws for all tokens of a clip, of which divide = \"tokens\" gives each "
                            "process a part; use dropout.rank or dropout.module, or divide = \"batches\"")
    console.log(f"{distributed.count} processes share the tokens of each clip")
    return ContextParallelProcesses(distributed.rank, distributed.count, distributed.local_rank)


# FSDP2


def shard(backbone: WanBackbone, processes: int, device: torch.device) -> None:
    """Shard the weights over the processes, in place; afterwards a forward needs all processes at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of a view, which nothing here writes to
    backbone.use_diffusers_forward()
    transformer = backbone.transformer
    mesh = init_device_mesh(device.type, (processes,))
    dtype = transformer.patch_embedding.weight.dtype
    replicated = {p for p in transformer.parameters() if p.dtype != dtype}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32))
    for module in (*transformer.blocks, transformer):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=replicated)
    for parameter in replicated:
        parameter.data = parameter.data.to(device)
    for name, buffer in transformer.named_buffers():
        parent, _, leaf = name.rpartition(".")
        transformer.get_submodule(parent)._buffers[leaf] = buffer.to(device)
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: a step's loss is divided by the samples of all processes already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def full_tensors(tree: Any) -> Any:
    """Plain containers with every sharded tensor gathered in host memory; a collective: all processes must call it."""
    if isinstance(tree, Tensor) and is_sharded(tree):
        sharded: Any = tree.detach()
        return sharded.full_tensor().to("cpu", copy=True)  # the copy waits for the gather
    if isinstance(tree, Mapping):
        return {key: full_tensors(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(full_tensors(value) for value in tree)
    return tree


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of a full tensor, as `parameter` is sharded; for a plain parameter the tensor itself."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    device = parameter.to_local().device
    local: Tensor = distribute_tensor(value.to(device), parameter.device_mesh, parameter.placements).to_local()
    return local


def as_dtensor(value: Tensor, parameter: Tensor) -> Tensor:
    """The inverse: a shard (on any device) as a DTensor like `parameter`, which `full_tensors` gathers."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value.to(parameter.to_local().device), parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; a plain tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, sharded over several processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
