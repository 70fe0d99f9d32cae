"""From what the user calls MODEL to a checked folder."""

from __future__ import annotations

from pathlib import Path

from lapwan.errors import UserError
from lapwan.wan.folder import ModelSpec, Task, read_spec

TINY = "tiny"


def resolve(model: str, task: Task | None = None, generation: bool = False) -> ModelSpec:
    """`tiny` (the task decides, else T2V), `tiny-t2v`, `tiny-i2v`, or a folder in diffusers layout.

    Args:
        generation: also take what lapwan only generates with (TI2V-5B).

    Raises:
        UserError: no such model, or one made for another task than the one asked for.
    """
    if model == TINY or model.startswith(f"{TINY}-"):
        from lapwan.tiny.model import tiny_folder

        kind = model.removeprefix(TINY).removeprefix("-") or task or "t2v"
        if kind not in ("t2v", "i2v"):
            raise UserError(f"no embedded model '{model}'; there are tiny, tiny-t2v and tiny-i2v")
        spec = read_spec(tiny_folder("i2v" if kind == "i2v" else "t2v"))
    else:
        spec = read_spec(Path(model).expanduser())
    if spec.task == "ti2v" and not generation:
        raise UserError(f"model {model} is a TI2V-5B model, which lapwan only generates with; use T2V-A14B or I2V-A14B")
    if task is not None and spec.task != task:
        wants = "takes an image (image-to-video)" if spec.task == "i2v" else "takes no image (text-to-video)"
        raise UserError(f"model {model} {wants}, but {task} was asked for")
    return spec
