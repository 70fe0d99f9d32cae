"""CLIP rewards: HPS v2.1, CLIP and PickScore are one model with different weights and scales. Models and tokenizers.

Shapes: B images, N captions, D dimensions of the embedding, H, W pixels.
Source: Radford et al. (arXiv 2103.00020); Wu et al., HPS v2 (arXiv 2306.09341); Kirstain et al. (arXiv 2305.01569).
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lapwan.documents import checked, decoded, read_json
from lapwan.errors import UserError
from lapwan.faults import library_reads
from lapwan.models.configs import ClipConfig, check_tokenizer
from lapwan.rewards.base import EmbeddingCache, RewardKind
from lapwan.rewards.preprocess import Convention, to_square
from lapwan.settings.rewards import ClipSettings, HpsSettings, PickScoreSettings
from lapwan.wan.text import clean_prompt

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

AnyClip = ClipSettings | PickScoreSettings | HpsSettings
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48894
_MERGES_BYTES = 16 << 20  # of the merges unpacked
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's normalisation, per channel of [0, 1].
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipReward:
    """image = f(normalised square)/‖·‖, text = g(77 tokens)/‖·‖ of a frozen CLIPModel; embeddings in fp32.

    Args:
        convention: how an image becomes the square input.
        scale: None: the model's own logit scale, exp(s).
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
        """[N, D] fp32, unit norm, without gradient; captions are truncated to the model's context."""
        return self._cache.get(captions, self._encode).to(self._model.device)

    def _encode(self, captions: list[str]) -> Tensor:
        tokens = self._tokenizer([clean_prompt(caption) for caption in captions], padding="max_length",
                                 truncation=True, max_length=self._tokenizer.model_max_length, return_tensors="pt")
        # No mask: attention is causal, so the output at the end token does not depend on the padding after it.
        features = self._model.get_text_features(tokens.input_ids.to(self._model.device)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def image(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] fp32, unit norm; resizing and normalising in fp32 whatever the model's dtype."""
        square = to_square(pixels_BCHW.float(), self._size, self._convention)
        square = (square - self._mean.to(square)) / self._std.to(square)
        features = self._model.get_image_features(square.to(self._model.dtype)).pooler_output
        return F.normalize(features.float(), dim=-1)


class ClipFolder(RewardKind[AnyClip]):
    """A CLIPModel in a transformers folder; `what` tells in messages what the folder should be."""

    scale: float | None = None  # the model's own

    def __init__(self, what: str) -> None:
        self._what = what

    def config(self, settings: AnyClip) -> CLIPConfig:
        """The model's configuration.

        Raises:
            UserError: as `read_clip_config`.
        """
        return read_clip_config(settings.path, self._what)

    def load(self, settings: AnyClip, dtype: torch.dtype) -> CLIPModel:
        """The frozen model, on the CPU.

        Raises:
            UserError: as `load_clip_folder`.
        """
        return load_clip_folder(settings.path, dtype, self._what)

    def files(self, settings: AnyClip) -> Sequence[Path]:
        return (settings.path,)

    def check(self, settings: AnyClip) -> None:
        self.config(settings)
        self._tokenizer(settings)

    def bytes(self, settings: AnyClip, device_type: str, images: int) -> int:
        from accelerate import init_empty_weights
        from transformers import CLIPModel

        config = self.config(settings)
        with init_empty_weights():
            weights = sum(p.numel() for p in CLIPModel(config).parameters())
        dtype = _dtype(settings.dtype, device_type)
        return int(weights + images * activation_elements(config)) * dtype.itemsize

    def make(self, settings: AnyClip, device: torch.device | str) -> ClipReward:
        tokenizer_path = self._tokenizer(settings)
        model = self.load(settings, _dtype(settings.dtype, torch.device(device).type))
        text = model.config.text_config
        tokenizer = load_tokenizer(tokenizer_path, int(text.vocab_size), int(text.max_position_embeddings))
        return ClipReward(settings.label, model, tokenizer, settings.preprocess, self.scale).to(device)

    def _tokenizer(self, settings: AnyClip) -> Path:
        key = f'tokenizer = "FOLDER" in the table of the reward {settings.label}'
        return find_tokenizer(settings.tokenizer, settings.path, key)


def _dtype(name: str, device_type: str) -> torch.dtype:
    fp32 = name == "fp32" or (name == "auto" and device_type == "cpu")
    return torch.float32 if fp32 else torch.bfloat16


def activation_elements(config: CLIPConfig) -> int:
    """Elements that the vision tower keeps for the backward through one image.

    A block of a frozen pre-norm transformer keeps 6 widths per token (both norms' inputs, q, k, v and the attention's
    output) and the activation's input.
    """
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    block = 6 * vision.hidden_size + vision.intermediate_size
    return int(tokens * (vision.num_hidden_layers * block + 2 * vision.hidden_size))  # and the first norm


def read_clip_config(folder: Path, what: str) -> CLIPConfig:
    """The configuration of a CLIPModel's folder; checks that it is one and has weights.

    Raises:
        UserError: no such folder, another model, or no weights; `what` tells what the folder should be.
    """
    from transformers import CLIPConfig

    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; give {what}, fetched with: hf download ID --local-dir FOLDER")
    if not file.is_file():
        raise UserError(f"{folder} is not a transformers folder (no config.json); give {what}")
    config = read_json(file)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise UserError(f"{folder} holds a model of type {kind!r}, not 'clip'; give {what}")
    if not any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        raise UserError(f"no weights in {folder} (model.safetensors or pytorch_model.bin); is the download complete?")
    checked(config, ClipConfig, file)
    with library_reads("the configuration", file):
        return CLIPConfig.from_dict(config)


def load_clip_folder(folder: Path, dtype: torch.dtype, what: str) -> CLIPModel:
    """A frozen CLIPModel in eval mode from a transformers folder; no tensor may be missing.

    Raises:
        UserError: as `read_clip_config`, or weights that are unreadable, incomplete or do not match the config.
    """
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break our own progress lines
    read_clip_config(folder, what)
    with library_reads("the model", folder):
        model, report = CLIPModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    if report["missing_keys"]:
        raise UserError(f"{folder} lacks {len(report['missing_keys'])} tensors of its CLIPModel, such as "
                        f"'{min(report['missing_keys'])}'; give {what}")
    return model.eval().requires_grad_(False)


def find_tokenizer(tokenizer: Path | None, weights: Path, key: str) -> Path:
    """The tokenizer's folder or merges file: `tokenizer`, or else beside `weights` (a file, or a model folder).

    Raises:
        UserError: there is none; `key` names the setting to give.
    """
    path = tokenizer if tokenizer is not None else weights if weights.is_dir() else weights.parent
    if path.is_file():
        return path
    if (path / "tokenizer.json").is_file() or all((path / n).is_file() for n in ("vocab.json", "merges.txt")):
        return path
    if (path / BPE_FILE).is_file():
        return path / BPE_FILE
    raise UserError(
        f"no CLIP tokenizer in {path}: it needs tokenizer.json, or vocab.json and merges.txt (those of any CLIP model, "
        f"such as openai/clip-vit-large-patch14), or open_clip's {BPE_FILE}; put it there, or name its folder "
        f"with {key}"
    )


def load_tokenizer(path: Path, vocabulary: int, context: int) -> CLIPTokenizer:
    """The tokenizer at `path` (see `find_tokenizer`), for a model with `vocabulary` pieces and `context` tokens.

    Raises:
        UserError: it is unreadable, or not this model's.
    """
    from transformers import CLIPTokenizer

    if path.is_file():
        tokenizer = _from_merges(path)
    else:
        check_tokenizer(path)
        with library_reads("the tokenizer", path):
            tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
    # The end token is the last piece; the text embedding is read there.
    if len(tokenizer) != vocabulary or tokenizer.convert_tokens_to_ids(END) != vocabulary - 1:
        raise UserError(f"the tokenizer of {path} has {len(tokenizer):,} pieces, the model {vocabulary:,}; "
                        "they do not belong together: give a CLIP tokenizer")
    tokenizer.model_max_length = context
    return tokenizer


def _byte_characters() -> list[str]:
    """A printable character for each byte, in the vocabulary's order: printable bytes first, then the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _from_merges(path: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    try:
        with gzip.open(path, "rb") as file:
            lines = decoded(file.read(_MERGES_BYTES + 1), path, _MERGES_BYTES).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} as merges: {error}; give a tokenizer folder or {BPE_FILE}") from None
    characters = _byte_characters()
    ids = {piece: i for i, piece in enumerate([*characters, *(c + "</w>" for c in characters)])}
    pairs = []
    for line in lines[1:_MERGES + 1]:  # the first line is a title
        first, _, second = line.partition(" ")
        if first not in ids or second not in ids:
            raise UserError(f"{path} is not CLIP's merges: '{line[:40]}' joins no known pieces; give a tokenizer "
                            f"folder or {BPE_FILE}")
        pairs.append((first, second))
        ids.setdefault(first + second, len(ids))
    for token in (START, END):
        ids[token] = len(ids)
    return CLIPTokenizer(vocab=ids, merges=pairs)
