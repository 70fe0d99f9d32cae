"""CLIP's tokenizer from where it lies: a tokenizer folder, or the merges file that open_clip ships.

All CLIP models share one byte-level BPE of 49,408 pieces: 256 bytes, the same at a word's end, 48,894 merges, and two
marks. Source: Radford et al. (arXiv 2103.00020); the file's layout as openai/CLIP publishes it.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

from lapwan.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48894
START, END = "<|startoftext|>", "<|endoftext|>"


def find_tokenizer(given: Path | None, weights: Path, key: str) -> Path:
    """The tokenizer's folder or merges file: `given`, or beside `weights` (a file, or a model folder).

    Raises:
        UserError: none there; with what it takes. `key` names the setting.
    """
    place = given if given is not None else weights if weights.is_dir() else weights.parent
    if place.is_file():
        return place
    if (place / "tokenizer.json").is_file() or all((place / n).is_file() for n in ("vocab.json", "merges.txt")):
        return place
    if (place / BPE_FILE).is_file():
        return place / BPE_FILE
    raise UserError(
        f"no CLIP tokenizer in {place}: it takes tokenizer.json, or vocab.json and merges.txt (any CLIP model's will "
        f"do, such as openai/clip-vit-large-patch14's), or open_clip's {BPE_FILE}; put it there, or name its folder "
        f"with {key}"
    )


def load_tokenizer(place: Path, vocabulary: int, context: int) -> CLIPTokenizer:
    """The tokenizer at `place` (see `find_tokenizer`), for a model of `vocabulary` pieces and `context` tokens.

    Raises:
        UserError: unreadable, or not of this model.
    """
    from transformers import CLIPTokenizer

    if place.is_file():
        tokenizer = _from_merges(place)
    else:
        try:
            tokenizer = CLIPTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the tokenizer in {place}: {str(error).splitlines()[0]}") from None
    # The end mark is the last piece: there the text is read.
    if len(tokenizer) != vocabulary or tokenizer.convert_tokens_to_ids(END) != vocabulary - 1:
        raise UserError(f"the tokenizer of {place} has {len(tokenizer):,} pieces, the model {vocabulary:,}; "
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
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
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
    for mark in (START, END):
        ids[mark] = len(ids)
    return CLIPTokenizer(vocab=ids, merges=pairs)
