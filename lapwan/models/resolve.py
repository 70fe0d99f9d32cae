"""From MODEL, as the user gives it, to a checked model folder."""

from __future__ import annotations

import re
from pathlib import Path

from lapwan.checkpoints.container import file_kind
from lapwan.checkpoints.wan_keys import contents_of, transformer_shapes
from lapwan.checkpoints.weights import read_weights
from lapwan.errors import UserError
from lapwan.lora.noise_expert import noise_expert_from_file_name
from lapwan.models.configs import component_config, read_object
from lapwan.models.spec import (
    OTHER_WEIGHTS,
    ModelSpec,
    Task,
    component_files,
    read_spec,
    tensor_shapes,
    transformer_folders,
    weight_files,
)
from lapwan.names import NoiseExpert

_TOKENIZER_BYTES = 40 << 20  # umT5's tokenizer.json has 17 MB


def resolve(model: str, task: Task | None = None) -> ModelSpec:
    """A folder in diffusers layout, or a hub id such as `Wan-AI/Wan2.2-T2V-A14B-Diffusers` in the local hub cache.

    Raises:
        UserError: no such model, or a model for another task than `task`.
    """
    folder = Path(model).expanduser()
    spec = read_spec(_from_hub(model) if not folder.exists() and _is_hub_id(folder, model) else folder)
    check_weights(spec)
    check_task(spec, model, task)
    return spec


def check_task(spec: ModelSpec, model: object, task: Task | None) -> None:
    """Compare a model's task with the one asked for, if any; `model` names it in the message.

    Raises:
        UserError: they differ.
    """
    if task is not None and task not in spec.tasks:
        wants = "takes an image (image-to-video)" if spec.requires_image else "takes no image (text-to-video)"
        raise UserError(f"model {model} {wants}, but {task} was asked for")


def transformers_of(model: str) -> tuple[dict[NoiseExpert | None, list[Path]], ModelSpec | None]:
    """A model's transformers by noise expert (None: not known), and its spec if it is a whole model.

    Args:
        model: a file, a transformer's folder, a model folder or hub id, or a folder with a transformer for each noise
            expert (a run or checkpoint, the original release).

    Raises:
        UserError: no such model, or none of its weights.
    """
    path = Path(model).expanduser()
    if path.is_file() or path.suffix in (".safetensors", *OTHER_WEIGHTS):  # a missing file is named where it is read
        return {noise_expert_from_file_name(path): [path]}, None
    if path.is_dir() and not (path / "model_index.json").is_file():
        if present := transformer_folders(path):
            return {e: weight_files(folder) for e, folder in present.items()}, None
        named = {e.component: e for e in NoiseExpert}.get(path.resolve().name)
        return {named or noise_expert_from_file_name(path): weight_files(path)}, None
    spec = resolve(model)
    return {e: weight_files(spec.component(e)) for e in spec.noise_experts}, spec


def check_weights(spec: ModelSpec) -> None:
    """Compare the transformers' tensors with their config, from the files' headers.

    Raises:
        UserError: weights that are missing, unknown, of another shape, damaged, or quantised in a format not read.
    """
    for noise_expert in spec.noise_experts:
        folder = spec.component(noise_expert)
        files = weight_files(folder)
        shapes, needed = tensor_shapes(files), transformer_shapes(component_config(folder))
        name = files[0].resolve()  # of separate files not the link, but the file that the user gave
        if missing := needed.keys() - shapes.keys():
            raise UserError(f"{name} lacks {len(missing)} of {len(needed)} tensors of this transformer, such as "
                            f"'{min(missing)}'; is the download complete?")
        if unknown := shapes.keys() - needed.keys():
            kind = contents_of(unknown)
            why = f"it is {kind}" if kind else "it is another model, which lapwan does not support"
            raise UserError(f"{name} has {len(unknown)} tensors that {spec.family.title} does not, such as "
                            f"'{min(unknown)}'; {why}")
        for key, shape in needed.items():
            if shapes[key] != shape:
                raise UserError(f"{name}: '{key}' has shape {list(shapes[key])}, but the transformer's config needs "
                                f"{list(shape)}")


def check_components(spec: ModelSpec) -> None:
    """Check the headers of the VAE's and the text encoder's files, and the tokenizer's files.

    Raises:
        UserError: a file that is missing, damaged, or a failed download.
    """
    for name in ("vae", "text_encoder"):
        for file in component_files(spec.path / name):
            read_weights(file)
    check_tokenizer(spec.path / "tokenizer")


def check_tokenizer(folder: Path) -> None:
    """Check that a folder has a tokenizer's files.

    Raises:
        UserError: it lacks one, or one is damaged or a failed download.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} is not a tokenizer folder: it has no tokenizer_config.json")
    for file in sorted(folder.glob("*.json")):
        read_object(file, _TOKENIZER_BYTES)
    pieces = folder / "spiece.model"
    if not (folder / "tokenizer.json").is_file():
        if not pieces.is_file():
            raise UserError(f"{folder} is no complete tokenizer folder: it has neither tokenizer.json nor spiece.model")
        if (kind := file_kind(pieces)) is not None:
            raise UserError(f"{pieces} is {kind}")


def _is_hub_id(folder: Path, model: str) -> bool:
    # `out/merged` while `out` exists is a mistyped path, not a repository.
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not folder.parent.is_dir()


def _from_hub(model: str) -> Path:
    """The snapshot in the local hub cache. Never downloads: a dry run or a typo must not fetch 126 GB."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise UserError(f"no model folder {model}, and no complete copy in the local hub cache; if it is a hub id, "
                        f"fetch it first: hf download {model}") from None
