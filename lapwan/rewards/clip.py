"""CLIP-shaped rewards: HPS v2.1, CLIP and PickScore are one model with other weights and another scale.

Shapes: B images, N captions, D dimensions of the embedding, H, W pixels.
Source: Radford et al. (arXiv 2103.00020); Wu et al., HPS v2 (arXiv 2306.09341); Kirstain et al. (arXiv 2305.01569).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.errors import UserError
from lapwan.rewards.base import EmbeddingCache
from lapwan.rewards.pixels import Convention, to_square
from lapwan.wan.text import clean_prompt

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

# What CLIP was trained with, per channel of [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipReward:
    """image = f(normalised square)/‖·‖, text = g(77 tokens)/‖·‖ of a frozen CLIPModel; embeddings in fp32.

    `scale` None takes the model's own logit scale, exp(s).
    """

    english_text = True

    def __init__(self, name: str, model: CLIPModel, tokenizer: CLIPTokenizer, convention: Convention,
                 scale: float | None = None) -> None:
        self.name = name
        self.scale = float(model.logit_scale.detach().double().exp()) if scale is None else scale
        self._model, self._tokenizer, self._convention = model, tokenizer, convention
        self._size = int(model.config.vision_config.image_size)
        self._cache = EmbeddingCache()
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        self._model.to(device)
        return self

    def text(self, captions: Sequence[str]) -> Tensor:
        """[N, D] fp32, unit norm, without gradient; longer captions are cut at the model's context."""
        return self._cache.get(captions, self._encode).to(self._model.device)

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = self._tokenizer([clean_prompt(caption) for caption in captions], padding="max_length",
                                 truncation=True, max_length=self._tokenizer.model_max_length, return_tensors="pt")
        # No mask: attention is causal, so what is read at the end mark never sees the padding after it.
        found = self._model.get_text_features(tokens.input_ids.to(self._model.device)).pooler_output
        return F.normalize(found.float(), dim=-1)

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] fp32, unit norm; resizing and normalising in fp32 whatever the model's dtype."""
        square = to_square(pixels_BCHW.float(), self._size, self._convention)
        square = (square - self._mean.to(square)) / self._std.to(square)
        found = self._model.get_image_features(square.to(self._model.dtype)).pooler_output
        return F.normalize(found.float(), dim=-1)


def read_clip_config(folder: Path, what: str) -> CLIPConfig:
    """The configuration of a CLIPModel's folder, after a look at whether it is one and has weights.

    Raises:
        UserError: no such folder, another model, or no weights; `what` says what the folder should be.
    """
    from transformers import CLIPConfig

    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give {what}, fetched with: hf download ID --local-dir FOLDER")
    if not file.is_file():
        raise UserError(f"{folder} is not a transformers folder (no config.json); give {what}")
    try:
        said: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    kind = said.get("model_type") if isinstance(said, dict) else None
    if kind != "clip":
        raise UserError(f"{folder} holds a model of type {kind!r}, not 'clip'; give {what}")
    if not any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        raise UserError(f"no weights in {folder} (model.safetensors or pytorch_model.bin); is the download complete?")
    return CLIPConfig.from_dict(said)


def load_clip_folder(folder: Path, dtype: torch.dtype, what: str) -> CLIPModel:
    """A frozen CLIPModel in eval mode from a transformers folder, strictly: no tensor missing.

    Raises:
        UserError: as `read_clip_config`, unreadable, incomplete, or of other shapes than its config says.
    """
    from safetensors import SafetensorError
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would tear our own progress lines apart
    read_clip_config(folder, what)
    try:
        model, report = CLIPModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot read the model in {folder}: {str(error).splitlines()[0]}") from None
    if report["missing_keys"]:
        raise UserError(f"{folder} lacks {len(report['missing_keys'])} tensors of its CLIPModel, such as "
                        f"'{min(report['missing_keys'])}'; give {what}")
    return model.eval().requires_grad_(False)
