"""Measured peak memory of a run, and the error message when the GPU runs out of memory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lapwan.errors import UserError

if sys.platform != "win32":
    import resource


def memory_figures() -> dict[str, float]:
    """Peak memory so far in GiB: of the GPU if there is one, else of the process (not on Windows)."""
    if torch.cuda.is_available():
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    if sys.platform == "win32":
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}


def start_peak() -> None:
    """Reset the GPU's peak, so that it does not include loading."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_line(predicted: int) -> str | None:
    """Measured and predicted peak on a GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    measured = torch.cuda.max_memory_allocated()
    return (f"memory: peak {measured / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f} "
            f"({100 * (predicted - measured) / max(measured, 1):+.1f} %)")


def out_of_memory(error: Exception, run: Path, step: int, resume_command: str, plan: str) -> UserError:
    """The error to show: the memory in use, and what to change, most effective first."""
    peak = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = (f" (peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of this process, {free / 2**30:.1f} of "
                f"{total / 2**30:.1f} GiB free now)")
    planned = f"; the plan was {plan}" if plan else ""
    message = str(error).splitlines()[0] if str(error) else "no details"
    return UserError(
        f"out of memory in step {step + 1}{peak}: {message}{planned}; the state of step {step} is saved in {run}. "
        "Change one of these, most effective first: memory = \"stream\", activation_checkpointing = \"block\", "
        "dtype = \"fp8\" or \"nf4\", batch_size = 1 with a larger accumulate, fewer blocks in [targets], shorter or "
        "smaller clips in the cache, noise_experts = [\"high\"] and then [\"low\"] in two runs; then "
        f"{resume_command} --allow-changed"
    )
