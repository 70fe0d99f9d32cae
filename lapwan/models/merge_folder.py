"""Writing a merged model folder: merged transformers, every other file copied or hard-linked unchanged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lapwan import console
from lapwan.checkpoints.rewrite import Advance
from lapwan.errors import UserError
from lapwan.files import atomic_folder, is_temporary
from lapwan.lora.merge import ComponentPlan, write_component

# Bytes from which a file is hard-linked: weights. Smaller ones are configs, which people edit in place.
_LINK_FROM = 1 << 20
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
_DISK_MARGIN = 64 << 20


def carried_files(folder: Path, plans: Sequence[ComponentPlan]) -> tuple[list[Path], list[Path]]:
    """(files to copy or link, files to leave out), relative to `folder`.

    Other formats of a merged transformer's weights are left out: they would still hold the unmerged weights.
    Hidden files (version control, download caches) are not part of a model.
    """
    rewritten = {file.path for plan in plans for file in plan.files}
    merged = {file.path.parent for plan in plans for file in plan.files}
    carried: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(_walk(folder)):
        if path in rewritten:
            continue
        stale = path.parent in merged and path.suffix in (*_OTHER_WEIGHTS, ".safetensors")
        (left_out if stale else carried).append(path.relative_to(folder))
    return carried, left_out


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or is_temporary(path):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file():
            yield path


def check_disk(output: Path, needed: int) -> None:
    """Check free disk space before the work; `needed` in bytes.

    Raises:
        UserError: too little, with both figures.
    """
    parent = _existing(output)
    free = shutil.disk_usage(parent).free
    if free < needed + _DISK_MARGIN:
        raise UserError(f"not enough disk for {output}: {needed / 2**30:.3g} GiB needed, {free / 2**30:.3g} GiB free "
                        f"on {parent}; free some space or choose another output")


def folder_bytes(folder: Path, output: Path, plans: Sequence[ComponentPlan], link: bool) -> int:
    """Bytes a merged copy of `folder` takes at `output`: the merged files, and files copied rather than linked."""
    carried, _ = carried_files(folder, plans)
    files = [(folder / path).stat() for path in carried]
    device = _existing(output).stat().st_dev
    copied = [f.st_size for f in files if not (link and f.st_size >= _LINK_FROM and f.st_dev == device)]
    return sum(plan.size for plan in plans) + sum(copied)


def _existing(path: Path) -> Path:
    """The nearest existing folder at or above `path`."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def write_folder(
    folder: Path, output: Path, plans: Sequence[ComponentPlan], link: bool, advance: Advance, verify: bool = False
) -> None:
    """Write the merged model folder atomically; configs and indices are copied byte for byte."""
    carried, left_out = carried_files(folder, plans)
    for path in left_out:
        console.warn(f"{folder / path} is not copied: it holds unmerged weights in another format")
    with atomic_folder(output) as temporary:
        for path in carried:
            _carry(folder / path, temporary / path, link)
        for plan in plans:
            targets = [temporary / file.path.relative_to(folder) for file in plan.files]
            assert all(target.resolve().is_relative_to(temporary.resolve()) for target in targets), targets
            write_component(plan, targets, advance, verify)


def _carry(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()  # a hub's snapshot folder holds links into its blobs
    if link and real.stat().st_size >= _LINK_FROM:
        try:
            os.link(real, target)
            return
        except OSError as error:  # another file system, or one without hard links
            console.detail(f"{source} is copied: {error.strerror}")
    shutil.copyfile(real, target)
