"""The device and the dtype a model computes in."""

from __future__ import annotations

import torch
from torch import Tensor

from lapwan.errors import UserError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (a GPU if there is one; of several, the one of this process's `local_rank`), `cpu`, `cuda` or `cuda:N`.

    A GPU is returned with its index, since torch's memory limits and statistics require one. It becomes the current
    device, on which Triton's kernels run.

    Raises:
        UserError: not a device, or a GPU that does not exist.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{local_rank % torch.cuda.device_count()}" if local_rank else "cuda"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = '{name}': allowed are auto, cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device = '{name}': allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = '{name}': this machine has {torch.cuda.device_count()} CUDA devices that torch "
                        f"{torch.__version__} can use; use --device cpu, or install a CUDA build of torch")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on a GPU, fp32 on a CPU; or `fp32`, `bf16`, `fp16`."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return named.get(name, torch.bfloat16 if device.type == "cuda" else torch.float32)


def hardware(device: torch.device) -> str:
    """What the rounding of sums depends on: the GPU's name, or a CPU's vector instructions and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'' if threads == 1 else 's'}"


def limit_memory(device: torch.device, gib: float) -> None:
    """Limit torch to `gib` GiB of a GPU; does nothing on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)


def free_bytes(device: torch.device) -> int | None:
    """What torch can still allocate on a CUDA device, its own unused cache included; None on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def unlimit_memory(device: torch.device) -> None:
    """Lift `limit_memory` of a GPU, which otherwise lasts as long as the process."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def widened(x: Tensor) -> Tensor:
    """x in fp32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
