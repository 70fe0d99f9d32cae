"""Processes that tests start: forked from a server that has imported torch, diffusers and transformers once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext

PATIENCE = 600.0  # seconds; only what hangs takes so long, also on a machine that has much else to do


def fork_server() -> ForkServerContext:
    """Each process is a real one, with nothing of this one's state, but need not import the libraries again.

    A plain fork of this process would not do: autograd refuses to work in one once it has run here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lapwan.api"])
    return context


def take_environment(environment: Mapping[str, str]) -> None:
    """The server's environment is that of the test that started it."""
    os.environ.clear()
    os.environ.update(environment)
