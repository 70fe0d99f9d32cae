"""What is refused of an adapter's update: values that are not finite, or too large for a file; a kind that cannot act.

Each check names the module, and the tensor if it is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lapwan.checkpoints.tensors import all_finite
from lapwan.errors import UserError
from lapwan.lora.state import WeightUpdate

RETRAIN = "its training diverged, or the file is damaged; use an earlier saved step, or train or download it again"


def check_finite(
    path: str, update: WeightUpdate, file: Path | None = None, names: Mapping[str, str] | None = None,
    remedy: str = RETRAIN,
) -> None:
    """Refuse an update with NaN or infinite values.

    Args:
        path: the tensor that it changes.
        update: the update.
        file: the file that it was read from, for the message.
        names: of its tensors in the file by part, `alpha` among them, for the message.
        remedy: the end of the message.

    Raises:
        UserError: names the module and the tensor.
    """
    bad = None if math.isfinite(update.scale) else "alpha"
    bad = bad or next((part for part, tensor in update.parts().items() if not all_finite(tensor)), None)
    if bad is not None:
        words = f"{'alpha' if bad == 'alpha' else update.PARTS.get(bad, bad)} of the {update.kind}"
        raise not_finite(path, words, file, (names or {}).get(bad), remedy)


def not_finite(path: str, words: str, file: Path | None, name: str | None, remedy: str = RETRAIN) -> UserError:
    """The error for values of an adapter that are not finite.

    Args:
        path: the tensor that is changed.
        words: what of the update it is, in words.
        file: the file that it was read from.
        name: the tensor's name in the file.
        remedy: the end of the message.
    """
    where = f"{file}: " if file else ""
    if name:
        return UserError(f"{where}'{name}' holds NaN or infinity ({words}, module '{path}'): {remedy}")
    return UserError(f"{where}the {words} of module '{path}' holds NaN or infinity: {remedy}")


def check_fits(path: str, update: WeightUpdate, sources: Sequence[WeightUpdate]) -> None:
    """Refuse values that became infinite in the dtype that they are to be written in.

    Args:
        path: the tensor that is changed.
        update: the update to write.
        sources: the updates that it was computed from.

    Raises:
        UserError: names the module and the tensor; or one of the sources is not finite itself.
    """
    for part, tensor in update.parts().items():
        if not all_finite(tensor):
            for source in sources:
                check_finite(path, source)
            raise UserError(f"module '{path}': the {update.PARTS.get(part, part)} of the {update.kind} has values that "
                            f"{str(tensor.dtype).removeprefix('torch.')} cannot hold (at most "
                            f"{torch.finfo(tensor.dtype).max:g}); use --dtype bfloat16 or float32")
