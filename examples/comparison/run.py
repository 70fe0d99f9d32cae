"""Run the rows in parallel processes, each as soon as its prerequisites are done; stop in time and resume later."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from examples.comparison import work
from examples.comparison.rows import Row, all_rows, best_lr, folder_of, key_of, read_result, trained_name, write_row
from examples.comparison.workspace import Workspace
from lapwan import console
from lapwan.errors import UserError


def run_rows(workspace: Workspace, processes: int, seconds: float | None = None) -> tuple[dict[str, Any], list[str]]:
    """Every row's result by name, and the names of those left over.

    Args:
        seconds: no row is started after so long.

    Raises:
        UserError: a row failed; what is done stays done.
    """
    began, todo = time.monotonic(), all_rows(workspace.settings)
    results: dict[str, Any] = {}
    running: dict[Future[tuple[dict[str, Any], float]], tuple[Row, str]] = {}
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    pool = ProcessPoolExecutor(processes, context, initializer=work.start_worker, initargs=(1,))
    try:
        while todo or running:
            in_time = seconds is None or time.monotonic() - began < seconds
            todo = _start(workspace, pool, todo, running, results, processes if in_time else 0)
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                row, key = running.pop(future)
                try:
                    result, took = future.result()
                except UserError as error:
                    raise UserError(f"row '{row.name}': {error}") from None
                results[row.name] = write_row(workspace, row, key, result, took)
                console.log(f"{time.monotonic() - began:6.1f} s  {row.name} ({took:.1f} s), {len(todo)} waiting, "
                            f"{len(running)} running")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results, [row.name for row in todo]


def _start(
    workspace: Workspace, pool: ProcessPoolExecutor, todo: list[Row], running: dict[Any, tuple[Row, str]],
    results: dict[str, Any], processes: int,
) -> list[Row]:
    """Read the results that exist, start the rows that are ready; returns the rows still waiting."""
    waiting: list[Row] = []
    for row in todo:
        ready = all(name in results for name in (*row.after, *row.sweeps))
        if ready and (stored := read_result(workspace, row, results)) is not None:
            results[row.name] = stored
            continue
        if not ready or len(running) >= processes or (row.alone and (running or len(waiting))):
            waiting.append(row)
            continue
        key = key_of(workspace, row, results)
        arguments = _arguments(workspace, row, results)
        running[pool.submit(_work, workspace, row, arguments)] = (row, key)
    # A result that was read may make an earlier row ready.
    return waiting if running or len(waiting) == len(todo) else _start(
        workspace, pool, waiting, running, results, processes)


def _arguments(workspace: Workspace, row: Row, results: Mapping[str, Any]) -> dict[str, Any]:
    """The row's arguments with the chosen lr, and its folder or that of the training row it judges."""
    s, arguments = workspace.settings, dict(row.arguments)
    if row.work is work.train_arm and "lr" not in arguments:
        arguments["lr"] = best_lr(s, arguments["task"], arguments["arm"], results)
    if row.work in (work.train_arm, work.train_stage1, work.timing):
        arguments["folder"] = folder_of(workspace, row.name)
    elif row.work in (work.test_arm, work.routing):
        source = row.source
        if source is not None and source.startswith("first "):
            source = trained_name(s, arguments["task"], source.removeprefix("first "), s.seeds[0], results)
        arguments["folder"] = None if source is None else folder_of(workspace, source)
    return arguments


def _work(workspace: Workspace, row: Row, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """In a worker process."""
    began = time.monotonic()
    folder_of(workspace, row.name).mkdir(parents=True, exist_ok=True)
    return {**row.work(workspace, **arguments), "machine": machine()}, time.monotonic() - began


def machine() -> dict[str, Any]:
    """What a row ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
