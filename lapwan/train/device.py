"""Where a run computes and in which precision."""

from __future__ import annotations

import torch

from lapwan.errors import UserError


def pick_device(name: str) -> torch.device:
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: not a device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device = '{name}': allowed are auto, cpu, cuda and cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device = '{name}': allowed are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = '{name}': this machine has {torch.cuda.device_count()} CUDA devices that torch "
                        f"{torch.__version__} can use; use --device cpu, or install a CUDA build of torch")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    by_default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name, by_default)
