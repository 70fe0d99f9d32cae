"""The bytes of caption files as text: UTF-8, UTF-16 and UTF-32 by their mark, GB18030 (GBK), Windows-1252.

Bytes that are not UTF-8 are GB18030 or Windows-1252, whichever reads as a text. Chinese is a row of double bytes,
mostly common characters, beside each other; Western accents are single bytes between letters of ASCII. Detectors of
many encodings need more text than a caption has. `bench_encodings.py` in the tests counts both directions.
"""

from __future__ import annotations

import codecs
import unicodedata

from lapwan.errors import UserError

AUTO = "auto"
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)
_NAMES = {"gb18030": "GB18030 (GBK)", "cp1252": "Windows-1252", "utf-16": "UTF-16", "utf-32": "UTF-32"}
_WESTERN_MARKS = frozenset("‘’‚“”„–—…•°±²³µ·½¼¾×«»€£§©®™¿¡ªº´\xa0\xad")
_CHINESE_MARKS = frozenset("，。、；：？！“”‘’（）《》【】…—·～％℃×")


class UnreadableText(UserError):
    """Bytes that are no text. The message is the reason."""


def decode(raw: bytes, encoding: str = AUTO) -> tuple[str, str]:
    """(text, encoding) of a file's bytes; the encoding is empty for UTF-8, else its name for people.

    Args:
        encoding: `auto`, or the one to use; a mark of UTF-8, UTF-16 or UTF-32 goes before it.

    Raises:
        UnreadableText: the bytes do not fit, or hold the character NUL, which is none of a text.
    """
    by_mark = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    given = by_mark or (None if encoding == AUTO else encoding)
    try:
        if given is not None:
            text, used = raw.decode(given), given
        else:
            text, used = _guessed(raw)
    except UnicodeDecodeError as error:
        raise UnreadableText(f"not {_NAMES.get(given, given) if given else 'UTF-8, GB18030 or Windows-1252'} "
                             f"({error.reason} at byte {error.start}); set caption_encoding, or save it as "
                             "UTF-8") from None
    if "\0" in text:
        raise UnreadableText("holds NUL bytes, so it is no text, or UTF-16 without its mark; save it as UTF-8")
    return text, "" if used in ("utf-8", "utf-8-sig") else _NAMES.get(used, used)


def _guessed(raw: bytes) -> tuple[str, str]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        first = error
    else:
        if _mixes_scripts(text) and (chinese := _try(raw, "gb18030")) and not _chinese_doubt(chinese):
            return chinese, "gb18030"
        return text, "utf-8"
    chinese, western = _try(raw, "gb18030"), _try(raw, "cp1252")
    if chinese is not None and (western is None or _chinese_doubt(chinese) < _western_doubt(western)):
        return chinese, "gb18030"
    if western is not None:
        return western, "cp1252"
    raise first


def _mixes_scripts(text: str) -> bool:
    """Whether a text is of two-byte characters in UTF-8 that do not belong together, as those of 止血 in GBK."""
    beyond = {character for character in text if not character.isascii()}
    if not beyond or any(ord(character) >= 0x800 for character in beyond):
        return False
    scripts = {unicodedata.name(character, "none").split()[0] for character in beyond if ord(character) >= 0x100}
    return len(scripts) > 1 or any(0x180 <= ord(character) < 0x300 for character in beyond)


def _try(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _chinese_doubt(text: str) -> float:
    """The share of characters beyond ASCII that do not look like Chinese text.

    A character is doubtful if it is rare, and more so if it is alone, above all between letters of ASCII.
    """
    doubt = count = 0.0
    for at, character in enumerate(text):
        if character.isascii():
            continue
        count += 1
        if character in _CHINESE_MARKS:
            continue
        sides = [side for side in (text[at - 1:at], text[at + 1:at + 2]) if side]
        glued = sum(side.isascii() and side.isalpha() for side in sides)
        if glued == 2:
            doubt += 1
        elif not _is_common(character):
            beside = any(not side.isascii() for side in sides)
            doubt += (0.1 if _is_gb2312(character) else 0.3) if beside else 0.8 if glued else 0.5
    return doubt / max(count, 1)


def _is_common(character: str) -> bool:
    """Whether GB 2312 has the character among its 3,755 frequent ones."""
    raw = character.encode("gb18030")
    return len(raw) == 2 and 0xB0 <= raw[0] <= 0xD7 and raw[1] >= 0xA1


def _is_gb2312(character: str) -> bool:
    raw = character.encode("gb18030")
    return len(raw) == 2 and 0xA1 <= raw[0] <= 0xF7 and raw[1] >= 0xA1


def _western_doubt(text: str) -> float:
    """The share of characters beyond ASCII that do not look like a Western text.

    A letter is doubtful beside another character beyond ASCII (it seldom is), or as a capital inside a word in lower
    case; a mark is doubtful inside a word, unless it is an apostrophe or a dash.
    """
    doubt = count = 0.0
    for at, character in enumerate(text):
        if character.isascii():
            continue
        count += 1
        before, after = text[at - 1:at], text[at + 1:at + 2]
        beside = any(other and not other.isascii() for other in (before, after))
        if character.isalpha() and character not in "ªºµ":
            inside = character.isupper() and (before.islower() or (after.islower() and before.isalpha()))
            doubt += 1.0 if inside else 0.6 if beside else 0.0
        elif character in _WESTERN_MARKS:
            doubt += 0.6 if beside else 0.0
        else:
            doubt += 1.0
    return doubt / max(count, 1)
