"""`lapwan generate` as it is typed, small, and what it leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from command_line import Ran
from PIL import Image

SMALL = ("--num-frames", "5", "--size", "32x48", "--steps", "3", "--guidance", "1")


def generate(lapwan, *arguments: str, model: str = "tiny", prompt: str = "电凝钩切割组织", output: str = "a") -> Ran:
    return lapwan("generate", "--model", model, "--prompt", prompt, "-o", output, *SMALL, *arguments)


def frames(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])


def refused(ran: Ran, *words: str) -> None:
    """Exit code 2, and one line on stderr with these words."""
    assert ran.code == 2, ran
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ran.err, ran.err
    for word in words:
        assert word in lines[0], lines[0]
