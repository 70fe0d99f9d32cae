"""Run the rows in processes side by side, each as soon as what it waits for is done; stop in time and go on later."""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from lapwan import console
from examples.comparison import work
from examples.comparison.rows import Row, all_rows, best_lr, finished, folder_of, keep, key_of, trained_name
from examples.comparison.work import Place
from lapwan.errors import UserError


def run_rows(place: Place, processes: int, seconds: float | None = None) -> tuple[dict[str, Any], list[str]]:
    """Every row's result by name, and the names of those left over.

    Args:
        seconds: no row is started after so long.

    Raises:
        UserError: a row failed; what is done stays done.
    """
    began, todo = time.monotonic(), all_rows(place.settings)
    results: dict[str, Any] = {}
    running: dict[Future[tuple[dict[str, Any], float]], tuple[Row, str]] = {}
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    pool = ProcessPoolExecutor(processes, context, initializer=work.begin, initargs=(1,))
    try:
        while todo or running:
            in_time = seconds is None or time.monotonic() - began < seconds
            todo = _start(place, pool, todo, running, results, processes if in_time else 0)
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                row, key = running.pop(future)
                try:
                    result, took = future.result()
                except UserError as error:
                    raise UserError(f"row '{row.name}': {error}") from None
                results[row.name] = keep(place, row, key, result, took)
                console.log(f"{time.monotonic() - began:6.1f} s  {row.name} ({took:.1f} s), {len(todo)} waiting, "
                            f"{len(running)} running")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return results, [row.name for row in todo]


def _start(
    place: Place, pool: ProcessPoolExecutor, todo: list[Row], running: dict[Any, tuple[Row, str]],
    results: dict[str, Any], processes: int,
) -> list[Row]:
    """Take up results that are there already, start what can start; the rows still waiting."""
    waiting: list[Row] = []
    for row in todo:
        ready = all(name in results for name in (*row.after, *row.decided))
        if ready and (kept := finished(place, row, results)) is not None:
            results[row.name] = kept
            continue
        if not ready or len(running) >= processes or (row.alone and (running or len(waiting))):
            waiting.append(row)
            continue
        key = key_of(place, row, results)
        arguments = _arguments(place, row, results)
        running[pool.submit(_work, place, row, arguments)] = (row, key)
    # A result taken up may have let an earlier row go.
    return waiting if running or len(waiting) == len(todo) else _start(
        place, pool, waiting, running, results, processes)


def _arguments(place: Place, row: Row, results: Mapping[str, Any]) -> dict[str, Any]:
    """With the lr chosen, and the folder of the row itself or of the one it judges."""
    s, arguments = place.settings, dict(row.arguments)
    if row.work is work.train_arm and "lr" not in arguments:
        arguments["lr"] = best_lr(s, arguments["task"], arguments["arm"], results)
    if row.work in (work.train_arm, work.train_stage1, work.timing):
        arguments["folder"] = folder_of(place, row.name)
    elif row.work in (work.test_arm, work.routing):
        of = row.of
        if of is not None and of.startswith("first "):
            of = trained_name(s, arguments["task"], of.removeprefix("first "), s.seeds[0], results)
        arguments["folder"] = None if of is None else folder_of(place, of)
    return arguments


def _work(place: Place, row: Row, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """In a worker process."""
    began = time.monotonic()
    folder_of(place, row.name).mkdir(parents=True, exist_ok=True)
    return {**row.work(place, **arguments), "machine": machine()}, time.monotonic() - began


def machine() -> dict[str, Any]:
    """What a row ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
