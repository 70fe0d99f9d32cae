"""Choices of memory and dtype, shared by training and generation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from lapwan.names import Precision

DTYPES = ("auto", "fp32", "bf16", *(p.value for p in Precision))
TrainDtype = Literal["auto", "fp32", "bf16", "fp8", "int8", "nf4"]
GenerateDtype = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "nf4"]
MEMORY_WORDS = ("auto", "both", "one", "stream")


def precision_of(dtype: str) -> Precision | None:
    """The quantised precision that a dtype names; None for a plain dtype."""
    return Precision(dtype) if dtype in tuple(Precision) else None


def _memory(value: Any) -> Any:
    if value in MEMORY_WORDS:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", str(value), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"'{value}' is not understood; write {', '.join(MEMORY_WORDS)}, or a limit in GiB, such as "
                         "16")
    return float(match[1])


MemoryChoice = Annotated[Literal["auto", "both", "one", "stream"] | float, BeforeValidator(_memory)]
MEMORY_METAVAR = "auto|both|one|stream|GIB"
