"""What this machine has for lapwan: device, driver, kernels, memory, disk, optional packages, video and fonts.

How to add a check: a function that yields `Finding`s, called in `examine`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from lapwan.memory.plan import GIB, available_host_memory
from lapwan.report.contact_sheet import cjk_font
from lapwan.temporaries import remove_stale_once, temporary_folder
from lapwan.wan.quantise.linears import fp8_in_hardware
from lapwan.wan.transformer.kernels import TRITON

FindingStatus = Literal["ok", "note", "warn", "broken"]
_CHUNK, _MOST_SECONDS = 8 << 20, 1.5  # of writing, and of reading
_LEAST_DISK = 130 * GIB  # a released A14B folder in diffusers layout
_REQUIRED = ("diffusers", "transformers", "accelerate", "safetensors", "av", "matplotlib", "tensorboard", "jieba")
_EXTRAS = {  # optional package -> what it is for
    "prodigyopt": "optimizer prodigy: pip install 'lapwan[prodigy]'",
    "bitsandbytes": "optimizer adamw8bit: pip install 'lapwan[adamw8bit]'",
    "wandb": "tracker wandb: pip install 'lapwan[wandb]'", "trackio": "tracker trackio: pip install 'lapwan[trackio]'",
}
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """One line of the report. note: nothing to worry about; warn: slower or less than it could be; broken: a command
    that needs it fails."""

    name: str
    status: FindingStatus
    text: str


def examine(folder: Path) -> Iterator[Finding]:
    """Every check; the disk is that of `folder`, which is made if it is missing."""
    yield from _software()
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(devices):
        yield from _gpu(torch.device("cuda", index))
    if not devices:
        yield no_gpu(driver_version())
    yield from _host()
    yield from _disk(folder)
    yield from packages()
    yield from _video()
    path = cjk_font()
    yield Finding("fonts", "ok", str(path)) if path else Finding(
        "fonts", "note", "none with Chinese characters, for captions on contact sheets: apt install fonts-noto-cjk")


def _software() -> Iterator[Finding]:
    tested = sys.platform.startswith("linux")
    yield Finding("system", "ok" if tested else "warn", f"{platform.system()} {platform.machine()}, Python "
                  f"{platform.python_version()}{'' if tested else '; lapwan is tested on Linux'}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else (
        f"ROCm {torch.version.hip}" if torch.version.hip else "a CPU build")
    yield Finding("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def driver_version(file: Path = _DRIVER) -> str | None:
    """The version of NVIDIA's kernel module on Linux, which `file` tells; None without one."""
    if not file.is_file():
        return None
    match = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", file.read_text(encoding="utf-8", errors="replace"))
    return match[1] if match else "of unknown version"


def no_gpu(driver: str | None) -> Finding:
    """What it means that torch sees no GPU; `driver`: the version of NVIDIA's kernel module, if there is one."""
    if driver is None:
        return Finding("device", "note", "no GPU: the embedded model and all checks run on the CPU; Wan2.2 needs a GPU")
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and hidden.strip() in ("", "-1"):
        return Finding("device", "note", f"NVIDIA driver {driver}; its GPUs are hidden by CUDA_VISIBLE_DEVICES="
                                         f"{hidden!r}: everything runs on the CPU")
    cure = "install a CUDA build of torch (https://pytorch.org)" if torch.version.cuda is None else (
        f"torch is built for CUDA {torch.version.cuda}: install a newer driver or an older build, and check "
        "CUDA_VISIBLE_DEVICES")
    return Finding("device", "broken", f"NVIDIA driver {driver}, but torch sees no GPU; {cure}")


def _gpu(device: torch.device) -> Iterator[Finding]:
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    name = f"{device}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        yield Finding(name, "broken", f"{properties.name} does not compute: {reason}")
        return
    driver = driver_version()
    yield Finding(name, "ok", f"{properties.name}, capability {capability}, {free / GIB:.1f} of {total / GIB:.1f} GiB "
                  f"free{f', driver {driver}' if driver else ''}")
    bf16 = properties.major >= 8 or torch.version.hip is not None
    fp8 = fp8_in_hardware(device)
    yield Finding(f"{name} fp8", "ok" if fp8 and bf16 else "note" if bf16 else "warn",
                  "multiplied in hardware" if fp8 else
                  "not in hardware (from capability 8.9): --dtype fp8 saves memory, not time" if bf16 else
                  "neither fp8 nor bf16 in hardware (from capability 8.0): slow")
    TRITON.try_on(device)
    yield Finding(f"{name} Triton", "ok" if TRITON.works else "warn",
                  f"{_version('triton') or ''} builds kernels".strip() if TRITON.works else
                  "no kernels: it needs the package triton and a C compiler (apt install gcc); steps are slower")


def _host() -> Iterator[Finding]:
    available = available_host_memory()
    if available is None:
        yield Finding("host memory", "note", "unknown: read from Linux's /proc/meminfo only")
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    enough = available >= 32 * GIB
    yield Finding("host memory", "ok" if enough else "warn",
                  f"{available / GIB:.1f} of {total / GIB:.1f} GiB available, {os.cpu_count()} CPUs"
                  + ("" if enough else "; offloading A14B takes 15 (nf4) to 54 GiB (bf16)"))


def _disk(folder: Path) -> Iterator[Finding]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        written, read = disk_speed(folder)
    except OSError as error:
        yield Finding("disk", "broken", f"{folder} cannot be written ({error.strerror or error}); set LAPWAN_CACHE_DIR")
        return
    low = free < _LEAST_DISK
    yield Finding("disk", "warn" if low or read < 2e8 else "ok", f"{free / GIB:.0f} GiB free in {folder}; writes "
                  f"{written / 1e9:.2f}, reads {read / 1e9:.2f} GB/s"
                  + ("; a folder of A14B takes 118 GiB" if low else ""))


def disk_speed(folder: Path, most_bytes: int = 512 << 20) -> tuple[float, float]:
    """Bytes a second of writing and of reading a temporary file, each measured for at most 1.5 s.

    What is read has been flushed to the disk and dropped from the page cache where the system allows it.

    Args:
        folder: where the file is written and removed again.
        most_bytes: largest size of the file.

    Raises:
        OSError: the folder cannot be written to.
    """
    remove_stale_once(folder)
    with temporary_folder(folder) as temporary:
        return _file_speed(temporary / "speed", most_bytes)


def _file_speed(path: Path, most_bytes: int) -> tuple[float, float]:
    chunk = os.urandom(1 << 20) * (_CHUNK >> 20)
    started, size = time.perf_counter(), 0
    with path.open("wb", buffering=0) as stream:
        while size < most_bytes and time.perf_counter() - started < _MOST_SECONDS:
            size += stream.write(chunk)
        os.fsync(stream.fileno())
    written = size / (time.perf_counter() - started)
    with path.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, size = time.perf_counter(), 0
        while time.perf_counter() - started < _MOST_SECONDS and (data := stream.read(_CHUNK)):
            size += len(data)
    return written, size / (time.perf_counter() - started)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages(required: Sequence[str] = _REQUIRED) -> Iterator[Finding]:
    """The packages that lapwan needs, and those that only some options need."""
    versions = {name: _version(name) for name in required}
    yield Finding("packages", "ok", ", ".join(f"{name} {number}" for name, number in versions.items() if number))
    for name, number in versions.items():
        if number is None:
            yield Finding(name, "broken", f"not installed, and lapwan needs it: pip install {name}")
    for name, purpose in _EXTRAS.items():
        installed = _version(name) if find_spec(name) else None
        yield Finding(name, "ok" if installed else "note", installed or f"not installed; for the {purpose}")


def _video() -> Iterator[Finding]:
    if find_spec("av") is None:
        return  # `packages` names it
    import av

    h264 = "libx264" in av.codec.codecs_available
    program = "and ffmpeg" if shutil.which("ffmpeg") else "no ffmpeg program, which is not needed"
    yield Finding("video", "ok" if h264 else "broken", f"PyAV {av.__version__} with H.264, {program}" if h264 else
                  f"PyAV {av.__version__} has no H.264 encoder: pip install --force-reinstall av")
