"""Medians, spread, memory, clocks and useful operations of a row, in a JSON file that a later call goes on with."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch.profiler import ProfilerActivity, profile

from lapwan.wan.quantise.linears import Fp8Linear
from lapwan.wan.transformer.compile import compile_time

GIB = 2**30


@dataclass
class Row:
    """One measured row; seconds are wall clock around work that ends with a synchronisation."""

    name: str
    median: float
    low: float
    high: float
    count: int
    peak_gib: float
    reserved_gib: float
    tflops: float | None = None  # useful ones a second
    flops: dict[str, float] = field(default_factory=dict)  # by kind, of one call
    kernels_ms: dict[str, float] = field(default_factory=dict)  # by kind, of one call, by torch's profiler
    compile_seconds: float = 0.0
    clock_mhz: int | None = None
    watts: float | None = None
    power_capped: bool | None = None  # the driver holds the clock down to stay under the card's power limit
    target: str = ""
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def asked_while(work: Callable[[], object]) -> dict[str, Any]:
    """Clock, power and whether power limits the clock while `work` repeats: nvidia-smi's answer takes a moment."""
    if not torch.cuda.is_available():
        return {}
    fields = "clocks.sm,power.draw,clocks_event_reasons.active"
    asked = subprocess.Popen(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True)
    while asked.poll() is None:
        work()
    values = [part.strip() for part in asked.communicate()[0].splitlines()[0].split(",")]
    if asked.returncode != 0 or len(values) != 3:
        print("nvidia-smi:", values)
        return {}
    return {"clock_mhz": int(values[0]), "watts": float(values[1]), "power_capped": bool(int(values[2], 16) & 4)}


KINDS = {  # of kernels, by words in their names; what has none is pointwise, norms and reductions
    "copies": ("memcpy", "memset"),
    "attention backward": ("sdpa", "flash", "fmha", "attention"),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "products": ("nvjet", "gemm", "cutlass", "cublas", "xmma"),
}


def kernel_times(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call by kind of kernel, and of the whole call by the wall clock (profiled)."""
    if not torch.cuda.is_available():
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        wall = seconds_of(work)
    totals = {"wall": 1e3 * wall}
    for event in seen.key_averages():
        name = event.key.lower()
        back = any(word in name for word in ("bprop", "bwd", "backward"))
        kind = "the rest"
        if not name.startswith("triton"):  # those are named by all they fuse
            kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)
                         and (back or kind != "attention backward")), kind)
        totals[kind] = totals.get(kind, 0.0) + event.self_device_time_total / 1e3
    return {kind: round(taken, 3) for kind, taken in totals.items()}


def seconds_of(work: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def measure(
    name: str, work: Callable[[], object], flops: Flops | None = None, seconds: float = 8.0, least: int = 3,
    warm: int = 2, target: str = "", note: str = "",
) -> Row:
    """The median of as many repeats as fit in `seconds` (at least `least`), after `warm` that are not counted."""
    compiled = compile_time()[0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm):
        seconds_of(work)
    compiled = compile_time()[0] - compiled
    times: list[float] = []
    started = time.monotonic()
    while len(times) < least or (time.monotonic() - started < seconds and len(times) < 200):
        times.append(seconds_of(work))
    early = statistics.median(times[:5])
    card = asked_while(work) if early < 5 else {}  # nvidia-smi's answer is not worth another video
    row = row_of(name, times, flops, compiled, card, target, note)
    row.kernels_ms = kernel_times(work) if early < 5 else {}
    row.extra = {"median_of_first_five": early}
    return row


def row_of(
    name: str, times: list[float], flops: Flops | None, compiled: float, card: dict[str, Any], target: str, note: str
) -> Row:
    """A row from its times; low and high are the 10th and 90th percentile where there are ten, else the extremes."""
    ordered, cuda = sorted(times), torch.cuda.is_available()
    cut = len(ordered) // 10
    median = statistics.median(ordered)
    return Row(
        name, median, ordered[cut], ordered[-1 - cut], len(times),
        torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
        torch.cuda.max_memory_reserved() / GIB if cuda else 0.0,
        flops.total / median / 1e12 if flops else None, asdict(flops) if flops else {}, compile_seconds=compiled,
        **card, target=target, note=note,
    )


@dataclass(frozen=True)
class Flops:
    """2·multiply-adds by the unit's rate: products in bf16 and in fp8, attention forward and backward."""

    product: float = 0.0
    product8: float = 0.0
    attention: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.product + self.product8 + self.attention + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(mine + theirs for mine, theirs in zip(self._all, other._all, strict=True)))

    def times(self, factor: float) -> Flops:
        return Flops(*(factor * one for one in self._all))

    @property
    def _all(self) -> tuple[float, ...]:
        return self.product, self.product8, self.attention, self.backward


def forward_flops(model: WanTransformer3DModel, tokens: int, text: int = 512) -> Flops:
    """Of a forward: Linears and attention; the rest is under 0.1 %."""
    config = model.config
    width, ffn = config.num_attention_heads * config.attention_head_dim, config.ffn_dim
    eight = sum(isinstance(block.ffn.net[2], Fp8Linear) for block in model.blocks)
    linears = float(2 * tokens * (6 * width**2 + 2 * width * ffn) + 2 * text * 2 * width**2)
    attention = float(config.num_layers * 4 * tokens * (tokens + text) * width)
    return Flops((config.num_layers - eight) * linears, eight * linears, attention)


def step_flops(model: WanTransformer3DModel, tokens: int, last: int) -> Flops:
    """A forward, and through the last blocks the gradients of inputs: Linears once more, attention's twice.

    What is recomputed does not count, nor do the two and a half times that fused attention takes for its gradients.
    """
    whole, share = forward_flops(model, tokens), last / model.config.num_layers
    each = (whole.product + whole.product8) / model.config.num_layers
    return whole + Flops(product=each * last, backward=2 * whole.attention * share)


class Results:
    """Rows by name in a JSON file; a row that is there is not measured again unless asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.machine = machine()
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.rows, self.machine = stored["rows"], stored["machine"]

    def add(self, row: Row) -> None:
        self.rows[row.name] = asdict(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1), encoding="utf-8")
        print(line(self.rows[row.name]), flush=True)


def machine() -> dict[str, str]:
    cuda = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else "none", "torch": torch.__version__,
        "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }


def line(row: dict[str, Any]) -> str:
    flops = "" if row["tflops"] is None else f" {row['tflops']:6.0f} TFLOP/s"
    timing = f"{row['name']:<28} {row['median']:8.4f} s [{row['low']:.4f}, {row['high']:.4f}] n={row['count']:<3}"
    return (f"{timing} peak {row['peak_gib']:6.2f} GiB{flops} compile {row['compile_seconds']:5.1f} s "
            f"{row['clock_mhz'] or '-'} MHz {row.get('watts') or '-'} W  target {row['target'] or '-'} {row['note']}")


CEILINGS = {"product": "ceiling_bf16", "product8": "ceiling_fp8", "attention": "ceiling_attention_{}",
            "backward": "ceiling_attention_{}_backward"}


def bound(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> float | None:
    """Seconds of its products and attention at what this card sustained for each alone; None without those rows."""
    size, seconds = "480" if "480" in row["name"] else "256", 0.0
    for kind, flops in row.get("flops", {}).items():
        ceiling = rows.get(CEILINGS[kind].format(size))
        if flops and ceiling is None:
            return None
        seconds += flops / (1e12 * ceiling["tflops"]) if flops and ceiling else 0.0
    return seconds or None


def markdown(results: Sequence[Results], command: str) -> str:
    """The results as a table, with machine, versions and command."""
    host, rows = results[0].machine, {name: row for result in results for name, row in result.rows.items()}
    head = [
        f"# Speed on {host['gpu']}, {host['date']}", "",
        f"torch {host['torch']}, CUDA {host['cuda']}, cuDNN {host['cudnn']}, Python {host['python']}. A14B shapes, "
        "random weights, batch 1: speed only.", "", f"    {command}", "",
        "Median of n, [10 %, 90 %] of the times (the extremes under ten); peak is of torch's allocator; MHz and W "
        "are nvidia-smi's while the row runs, (capped) where power holds the clock down. Useful TFLOP/s "
        "count Linears and attention, and in a step the gradients of the trained blocks' inputs. Of the bound: those "
        "at the rates of the ceiling rows, over the time. Kernels: products / attention / its backward / the rest, of "
        "one profiled call.", "",
        "| row | seconds | to reach | of the bound | spread | n | peak GiB | TFLOP/s | kernels ms | MHz, W | "
        "compile s | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        flops = "" if row["tflops"] is None else f"{row['tflops']:.0f}"
        card = f"{row['clock_mhz']}, {row['watts']:.0f}" if row["clock_mhz"] else ""
        card += " (capped)" if row["power_capped"] else ""
        least = None if row["name"].startswith("ceiling") else bound(row, rows)
        share = "" if least is None else f"{100 * least / row['median']:.0f} %"
        parts = ("products", "attention", "attention backward", "the rest")
        kernels = " / ".join(f"{row['kernels_ms'].get(part, 0.0):.0f}" for part in parts) if row["kernels_ms"] else ""
        head.append(
            f"| {row['name']} | {row['median']:.4g} | {row['target']} | {share} | "
            f"{row['low']:.4g} – {row['high']:.4g} | {row['count']} | "
            f"{row['peak_gib']:.1f} | {flops} | {kernels} | {card} | {row['compile_seconds']:.0f} | "
            f"{row['note']} |"
        )
    return "\n".join(head) + "\n"
