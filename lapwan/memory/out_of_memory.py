"""How much memory a run takes, and what to say when there is not enough."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from lapwan.errors import UserError


def memory_figures() -> dict[str, float]:
    """Peak memory so far in GiB: of the GPU if one is used, else of the process."""
    if torch.cuda.is_available():
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def start_peak() -> None:
    """Count a GPU's peak from here on: loading has its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_line(predicted: int) -> str | None:
    """The run's peak on a GPU against the plan's; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    real = torch.cuda.max_memory_allocated()
    return (f"memory: peak {real / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f} "
            f"({100 * (predicted - real) / max(real, 1):+.1f} %)")


def out_of_memory(error: Exception, run: Path, step: int, resume_command: str, plan: str) -> UserError:
    """The error to show: how much was there, and what to change, what helps most first."""
    peak = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = (f" (peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of this process, {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB free now)")
    planned = f"; the plan was {plan}" if plan else ""
    said = str(error).splitlines()[0] if str(error) else "no detail"
    return UserError(
        f"out of memory in step {step + 1}{peak}: {said}{planned}; the state of step {step} is saved in {run}. "
        "To change, what helps most first: memory = \"stream\", activation_checkpointing = \"block\", "
        "dtype = \"fp8\" or \"nf4\", batch_size = 1 with a larger accumulate, fewer blocks in [targets], shorter or "
        "smaller clips in the cache, experts = [\"high\"] and then [\"low\"] in two runs; then "
        f"{resume_command} --allow-changed"
    )
