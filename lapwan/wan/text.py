"""Prompts to umT5 features: cleaned as Wan cleans them, kept at their true length, zero-padded only where used.

Shapes: B batch, N tokens, D features.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapwan.errors import UserError
from lapwan.faults import library_reads
from lapwan.models.configs import check_tokenizer, component_config
from lapwan.models.fingerprints import text_encoder_fingerprint
from lapwan.models.original_layout import TRANSFORMERS_STEM, load_text_files, loads_by_name, text_readers
from lapwan.models.spec import TEXT_LENGTH, component_files
from lapwan.names import Precision
from lapwan.wan.quantise.load import cache_folder, fill, linears_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

    from lapwan.models.spec import ModelSpec


@dataclass(frozen=True)
class TextEncoder:
    """A frozen umT5 encoder with its tokenizer."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase


def clean_prompt(text: str) -> str:
    """ftfy, HTML entities unescaped twice, white space collapsed (ftfy also folds full-width punctuation: ， to ,)."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def load_text_encoder(
    spec: ModelSpec, dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    precision: Precision | None = None,
) -> TextEncoder:
    """The model's umT5, frozen, in eval mode (it has dropout).

    Args:
        spec: the model.
        dtype: None: as stored.
        device: of the weights.
        precision: quantises the Linears of its blocks; None: not quantised.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # "Loading weights" would break our own progress lines
    folder = spec.path / "text_encoder"
    config = component_config(folder)
    with library_reads("the text encoder", folder):
        if precision is not None:
            model = _load_quantised(spec, dtype, device, precision)
        elif loads_by_name(files := component_files(folder), TRANSFORMERS_STEM):
            model = load_text_files(config, files, dtype)
        else:
            model, report = UMT5EncoderModel.from_pretrained(
                folder, dtype="auto" if dtype is None else dtype, local_files_only=True, output_loading_info=True
            )
            if missing := report["missing_keys"]:  # which transformers fills with random values
                raise UserError(f"the weights in {folder} lack {len(missing)} tensors of its config, such as "
                                f"'{min(missing)}'; is the download complete?")
    model.requires_grad_(False)
    check_tokenizer(spec.path / "tokenizer")
    with library_reads("the tokenizer", spec.path / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(spec.path / "tokenizer", local_files_only=True)
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer in {spec.path / 'tokenizer'} names no padding token; is its "
                        "tokenizer_config.json complete? Download it again")
    return TextEncoder(model.eval().to(device), tokenizer)


def _load_quantised(
    spec: ModelSpec, dtype: torch.dtype | None, device: torch.device | str, precision: Precision
) -> UMT5EncoderModel:
    from accelerate import init_empty_weights
    from transformers import UMT5Config, UMT5EncoderModel

    folder = spec.path / "text_encoder"
    with init_empty_weights():
        model = UMT5EncoderModel(UMT5Config(**component_config(folder)))
    model.encoder.embed_tokens = model.shared  # the class has the one embedding under two names
    source = text_readers(component_files(folder))
    source.pop("encoder.embed_tokens.weight", None)
    blocks = linears_of(model.encoder.block, "encoder.block")
    fill(model, source, blocks, precision, lambda name, stored: stored if dtype is None else stored.to(dtype), device,
         cache_folder(f"text {text_encoder_fingerprint(spec)}", precision))
    return model


@torch.no_grad()
def encode_text(encoder: TextEncoder, prompts: Sequence[str], length: int = TEXT_LENGTH) -> list[Tensor]:
    """[n tokens, D] per prompt, not padded, in the encoder's dtype; a prompt is truncated to `length` tokens.

    The batch is padded to its longest prompt and masked, so that a prompt's features do not depend on the others.

    Args:
        encoder: umT5 and its tokenizer.
        prompts: texts, cleaned here as Wan does.
        length: most tokens of a prompt.

    Raises:
        UserError: the tokenizer is another model's.
    """
    tokens = encoder.tokenizer(
        [clean_prompt(prompt) for prompt in prompts], padding="longest", max_length=length, truncation=True,
        add_special_tokens=True, return_attention_mask=True, return_tensors="pt",
    )
    if (piece := int(tokens.input_ids.max())) >= encoder.model.config.vocab_size:
        raise UserError(f"the tokenizer has a piece {piece}, but the text encoder {encoder.model.config.vocab_size:,} "
                        "pieces; they do not belong together: download both again")
    mask_BN = tokens.attention_mask.to(encoder.model.device)
    hidden_BND = encoder.model(tokens.input_ids.to(encoder.model.device), mask_BN).last_hidden_state
    return [hidden[:count].clone() for hidden, count in zip(hidden_BND, mask_BN.sum(dim=1).tolist(), strict=True)]


def pad_text(features: Sequence[Tensor], length: int = TEXT_LENGTH) -> Tensor:
    """[n, D] tensors -> [B, length, D], zeros after the text; Wan attends to those rows too, without a mask.

    Args:
        features: one [n, D] tensor per prompt, n at most `length`.
        length: rows of the result.
    """
    padded = features[0].new_zeros(len(features), length, features[0].shape[-1])
    for row, feature in zip(padded, features, strict=True):
        row[: feature.shape[0]] = feature
    return padded
