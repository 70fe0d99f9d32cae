"""Chinese word boundaries, so that 呼吸 is no mention of 吸: jieba with a user dictionary made from a taxonomy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

# Word frequencies for phrases of the taxonomy, against jieba's total of 6e7. High enough that the phrase is preferred
# to its own parts, low enough that a common word across its edge wins: 呼吸|引起 has no 吸引.
_FREQUENCY = {2: 20_000}
_FREQUENCY_LONG = 200_000


class Segmenter:
    """jieba's maximum-probability segmentation with `phrases` as words; private, so it changes no global state."""

    def __init__(self, phrases: Iterable[str]) -> None:
        frequencies, total = _dictionary()
        import jieba  # after _dictionary, which silences it

        self._jieba = jieba.Tokenizer()
        self._jieba.FREQ, self._jieba.total = frequencies.copy(), total
        self._jieba.initialized = True
        for phrase in phrases:
            if len(phrase) > 1:  # a single character keeps its own frequency, or it would split common words
                wanted = _FREQUENCY.get(len(phrase), _FREQUENCY_LONG)
                self._jieba.add_word(phrase, max(wanted, frequencies.get(phrase, 0)))

    def words(self, text: str) -> list[str]:
        """Consecutive words of a run of Chinese characters."""
        # HMM off: it invents words from single characters and could swallow a keyword
        words: list[str] = self._jieba.lcut(text, HMM=False)
        return words


@lru_cache(maxsize=1)
def _dictionary() -> tuple[dict[str, int], int]:
    # Read straight from the package: jieba's own cache in a world-writable temporary folder is no faster, and trusted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    pair: tuple[dict[str, Any], int] = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    return pair
