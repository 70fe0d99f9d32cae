"""`lapwan doctor`: what this machine has, and what of Wan2.2 fits on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import torch
from rich import box
from rich.table import Table

from lapwan import console
from lapwan.diagnostics.doctor import Finding, examine
from lapwan.errors import UserError
from lapwan.files import cache_root
from lapwan.memory import what_fits
from lapwan.memory.plan import GIB, available_host_memory
from lapwan.memory.throughput import measure_throughput
from lapwan.memory.what_fits import DTYPES, SIZES, WORKS, Fit, gib
from lapwan.models.device import free_bytes
from lapwan.settings.base import RunOptions, to_toml
from lapwan.settings.doctor import DoctorSettings

_STYLES = {"ok": "green", "note": "dim", "warn": "yellow", "broken": "bold red"}


def run(settings: DoctorSettings, options: RunOptions) -> None:
    """Check, print, plan, print.

    Raises:
        UserError: something is broken.
    """
    if options.dry_run:
        console.results.print(to_toml(settings), markup=False)
        return
    findings = []
    for finding in examine(settings.folder or cache_root()):
        findings.append(finding)
        if not settings.as_json:
            _print(finding)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    broken = [finding.name for finding in findings if finding.status == "broken"]
    free = int(settings.memory * GIB) if settings.memory is not None else (
        free_bytes(device) if device is not None and str(device) not in broken else None)
    fits = list(_fits(free, device)) if free is not None else []
    if settings.as_json:
        console.results.print(json.dumps(_document(findings, free, fits, device is not None), indent=2), markup=False)
    elif free is None:
        console.results.print("what fits: no GPU here; lapwan doctor --memory 24 shows what of Wan2.2 fits into 24 GiB",
                              markup=False)
    else:
        _print_fits(fits, free, device is not None)
    if broken:
        raise UserError(f"broken: {', '.join(broken)}; the lines above say what to do")


def _fits(free: int, device: torch.device | None) -> Iterator[Fit]:
    rates = what_fits.NOMINAL if device is None else measure_throughput(device, torch.bfloat16)
    host_free = None if device is None else available_host_memory()  # a GPU that is not here has another host
    with console.progress("plan", len(WORKS) * len(SIZES) * len(DTYPES), "case") as bar:
        for fit in what_fits.what_fits(free, host_free, rates):
            bar.advance()
            yield fit


def _print(finding: Finding) -> None:
    style = _STYLES[finding.status]
    console.results.print(f"[{style}]{finding.status:<7}[/] ", end="")
    console.results.print(f"{finding.name:<14} {finding.text}", markup=False)


def _print_fits(fits: Sequence[Fit], free: int, timed: bool) -> None:
    where = "of this machine's GPU" if timed else "of a GPU; this machine has none"
    table = Table(box=box.SIMPLE_HEAD)
    for name in (f"{what_fits.FRAMES} frames", *DTYPES):
        table.add_column(name)
    cells = {(fit.work, fit.size, fit.dtype): _cell(fit, timed) for fit in fits}
    for work in WORKS:
        for size in SIZES:
            table.add_row(f"{work}\n{size[0]}x{size[1]}", *(cells[work, size, dtype] for dtype in DTYPES))
    console.results.print(f"what of Wan2.2 T2V-A14B fits into {gib(free):.1f} GiB ({where})", markup=False)
    console.results.print(table)
    console.results.print(
        f"LoRAs of rank {what_fits.RANK} in the last {what_fits.LAST_BLOCKS} blocks of both noise experts, "
        f"{what_fits.EXPERTS} experts in a mixture.\nGiB of the GPU + of host memory that must be free; where the "
        f"noise experts are{'; seconds of a step' if timed else ''}.", markup=False)


def _cell(fit: Fit, timed: bool) -> str:
    host = f" + {gib(fit.plan.host):.0f}" if fit.plan.host else ""
    seconds = f", {fit.plan.strategy.seconds:.3g} s" if timed else ""
    if fit.fits:
        return f"[green]fits[/] {gib(fit.needed):.1f}{host} GiB\n{fit.where}{seconds}"
    if fit.plan.fits:
        return f"[yellow]host too small[/]\nneeds {gib(fit.plan.host):.0f} GiB there"
    return f"[red]does not fit[/]\nneeds {gib(fit.needed):.1f}{host} GiB"


def _document(
    findings: Sequence[Finding], free: int | None, fits: Sequence[Fit], timed: bool
) -> dict[str, object]:
    return {
        "findings": [{"name": item.name, "status": item.status, "text": item.text} for item in findings],
        "memory_gib": None if free is None else round(gib(free), 2),
        "wan22_t2v_a14b": [{
            "work": fit.work, "size": list(fit.size), "frames": what_fits.FRAMES, "dtype": fit.dtype, "fits": fit.fits,
            "gib": round(gib(fit.needed), 2), "host_gib": round(gib(fit.plan.host), 2), "weights": fit.where,
            "recomputed": fit.recomputed, "seconds_a_step": round(fit.plan.strategy.seconds, 3) if timed else None}
            for fit in fits],
    }
