"""lapwan: fine-tune, specialise, align and diagnose Wan2.2 video models.

    from lapwan import VideoGenerator
    VideoGenerator("tiny").generate(prompt="电凝钩切割组织").save("out.mp4")

The names below are imported on first use, so that `import lapwan` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lapwan.api import Video, VideoGenerator
    from lapwan.data.labels import label_caption
    from lapwan.data.taxonomy import load_taxonomy
    from lapwan.errors import Interrupted, UserError
    from lapwan.weights import inspect_weights, merge

__version__ = "0.1.0"
__all__ = [
    "Interrupted", "UserError", "Video", "VideoGenerator", "__version__", "inspect_weights", "label_caption",
    "load_taxonomy", "merge",
]

_MODULES = {
    "Interrupted": "lapwan.errors",
    "UserError": "lapwan.errors",
    "Video": "lapwan.api",
    "inspect_weights": "lapwan.weights",
    "merge": "lapwan.weights",
    "VideoGenerator": "lapwan.api",
    "label_caption": "lapwan.data.labels",
    "load_taxonomy": "lapwan.data.taxonomy",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'lapwan' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
