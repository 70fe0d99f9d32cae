"""Text files of other programs and people: JSON, TOML and YAML, read whole and checked before they are used.

    text    at most so many bytes, UTF-8 (a byte order mark is dropped), no NUL
    values  nested at most 64 deep, no key twice in an object, whole numbers of 64 bits, no NaN or infinity (JSON)
    types   `checked`: a pydantic type; the error names the file, the key and the value

How to read one more file: `read_json(path)` (or `read_toml`, `read_yaml`), then `checked(value, Type, path)` with a
model or a type such as `dict[str, str]`. Types of JSON of other programs are declared with `Count` and `Number`, which
take neither true nor "4" for a number.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from lapwan.errors import UserError

T = TypeVar("T")
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]  # a size of a model
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]

JSON_BYTES, TOML_BYTES, YAML_BYTES, _LINE_BYTES = 16 << 20, 4 << 20, 4 << 20, 1 << 20
LIST_BYTES = 256 << 20  # of a list of clips that is read whole
TOKENIZER_BYTES = 64 << 20  # umT5's is 17 MB
_DEPTH = 64
_ALIASES = 16  # of a YAML file
_BIGGEST = 2**64
_DIGITS = 40  # of a number in JSON; Python itself refuses more than 4,300 with a message of its own
_ENCODINGS = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def read_text(path: Path, limit: int = JSON_BYTES) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Args:
        limit: most bytes; a larger file is not read.

    Raises:
        UserError: it cannot be read, is larger, or is not text in UTF-8.
    """
    return decoded(read_bytes(path, limit), path, limit)


def read_bytes(path: Path, limit: int = JSON_BYTES) -> bytes:
    """What is in a file that is read whole.

    Args:
        limit: most bytes; of a larger file, or an endless one, no more is read.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


def _too_large(source: object, limit: int) -> UserError:
    return UserError(f"cannot read {source}: it is larger than {limit >> 20} MiB, the most that such a file may have; "
                     "is it the right file?")


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"no such file: {path}")
    if isinstance(error, IsADirectoryError):
        return UserError(f"cannot read {path}: it is a folder; a file is needed here")
    return UserError(f"cannot read {path}: {error.strerror or error}")


def decoded(data: bytes, source: object, limit: int = JSON_BYTES) -> str:
    """Bytes of `source` as text.

    Args:
        limit: most bytes.

    Raises:
        UserError: larger, or not text in UTF-8.
    """
    if len(data) > limit:
        raise _too_large(source, limit)
    for mark, name in _ENCODINGS:
        if data.startswith(mark):
            raise UserError(f"cannot read {source}: it is {name}, not UTF-8; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {source}: not UTF-8 (byte {error.start}); save it as UTF-8, or is it the right "
                        "file?") from None
    if "\0" in text:
        raise UserError(f"cannot read {source}: it holds NUL characters, so it is no text file; is it the right file?")
    return text


def read_json(path: Path, limit: int = JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, limit), path)


def parse_json(text: str | bytes, source: object, non_finite: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        source: the file, and what of it if the text is a part, for messages.
        non_finite: NaN and Infinity, which are not JSON but which Python writes, are values too.

    Raises:
        UserError: not JSON, a key twice, a number that no program reads, or nested too deep.
    """
    try:
        value = json_value(text if isinstance(text, str) else text.decode("utf-8"), non_finite)
    except RecursionError:
        raise _too_deep(source) from None
    except UnicodeDecodeError:
        raise UserError(f"{source} is not valid JSON: not UTF-8") from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON: {error}") from None
    _check_depth(value, source)
    return value


def json_value(text: str, non_finite: bool = False) -> Any:
    """`parse_json` for a caller with messages of its own, such as the reader of a list's lines.

    Raises:
        ValueError: as `parse_json`; a `json.JSONDecodeError` if it is not JSON.
        RecursionError: nested too deep for Python.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_float,
                      parse_constant=float if non_finite else _no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"the key {name!r} is given twice in one object")
            names.add(name)
    return table


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _too_deep(source: object) -> UserError:
    return UserError(f"cannot read {source}: its values are nested more than {_DEPTH} deep; is it the right file?")


def _check_depth(value: Any, source: object, biggest: int | None = None) -> None:
    """Refuse what is nested too deep, so that nothing that walks the value later recurses without end; with `biggest`
    also larger whole numbers.

    It goes level by level and enters a list that a level holds twice, as YAML's aliases make them, once.
    """
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEPTH):
        inner: dict[int, Any] = {}
        for item in level:
            for part in item.values() if isinstance(item, dict) else item:
                if isinstance(part, dict | list):
                    inner[id(part)] = part
                elif biggest is not None and type(part) is int and abs(part) >= biggest:
                    raise UserError(f"cannot read {source}: it holds a whole number of {part.bit_length()} bits; at "
                                    "most 64 are allowed")
        if not inner:
            return
        level = list(inner.values())
    raise _too_deep(source)


def json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, text, value) of each line of a JSON lines file that is not empty; value None: not valid JSON.
    NaN and Infinity are values, as in the lines of older runs.

    Raises:
        UserError: it cannot be read, a line of more than 1 MiB, or not UTF-8.
    """
    try:
        with path.open("rb") as stream:
            for number in itertools.count(1):
                if not (raw := stream.readline(_LINE_BYTES + 1)):
                    return
                source = f"{path}, line {number}"
                if text := decoded(raw, source, _LINE_BYTES).strip():
                    try:
                        value = parse_json(text, source, non_finite=True)
                    except UserError:
                        value = None
                    yield number, text, value
    except OSError as error:
        raise unreadable(path, error) from None


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UserError: as `read_text` and `parse_toml`.
    """
    return parse_toml(read_text(path, TOML_BYTES), path)


def parse_toml(text: str, source: object) -> dict[str, Any]:
    """The tables of a TOML text.

    Raises:
        UserError: not TOML, nested too deep, or a number of more than 64 bits.
    """
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:
        raise UserError(f"{source} is not valid TOML: {error}") from None
    _check_depth(tree, source, _BIGGEST)
    return tree


def read_yaml(path: Path) -> Any:
    """The value in a YAML file: plain values only, with few aliases, which could make a short file endless.

    Raises:
        UserError: as `read_text`, not YAML, too many aliases, or nested too deep.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = read_text(path, YAML_BYTES)
    try:
        aliases = depth = 0
        for token in yaml.scan(text, loader):
            kind = type(token).__name__
            aliases += kind == "AliasToken"
            depth += kind.endswith(("SequenceStartToken", "MappingStartToken"))
            depth -= kind in ("BlockEndToken", "FlowSequenceEndToken", "FlowMappingEndToken")
            if depth > _DEPTH:
                raise _too_deep(path)
            if aliases > _ALIASES:
                raise UserError(f"cannot read {path}: it holds more than {_ALIASES} YAML aliases (*name); write the "
                                "values out")
        value = yaml.load(text, loader)
    except RecursionError:
        raise _too_deep(path) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    _check_depth(value, path, _BIGGEST)
    return value


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def checked(value: Any, kind: type[T], source: object) -> T:
    """`value` as `kind`, a pydantic model or a type.

    Args:
        source: the file, for messages.

    Raises:
        UserError: a missing key, or a value of another type: with the file, the key and the value.
    """
    try:
        result: T = _adapter(cast(Any, kind)).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{source}: {first_error(error)}") from None
    return result


def first_error(error: ValidationError) -> str:
    """The first of pydantic's errors: key, value, and what is allowed."""
    item = error.errors(include_url=False)[0]
    key = ""
    for part in item["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if item["type"] == "missing":
        return f"'{key}' is missing"
    given = item["input"]
    shown = f"a {_KINDS[type(given)]}" if type(given) in _KINDS else repr(given)
    return f"{key + ' = ' if key else ''}{shown}: {reason(item)}"


_KINDS: dict[type, str] = {dict: "table", list: "list"}
# Start of an error's type -> what a value must be.
_FORMS = {
    "int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false",
    "string": "a text", "path": "a path", "dict": "a table of keys and values",
    "model": "a table of keys and values", "list": "a list, such as [a, b]", "tuple": "a list, such as [a, b]",
}
_PATTERNS = {
    r"^(auto|cpu|cuda(:\d+)?)$": "auto, cpu, cuda or cuda:N", r"^\w+$": "letters, digits and _",
    r"^[\w.-]+$": "letters, digits, '.', '_' and '-'", r"^[^/\\\n]+$": "a name without '/' and '\\'",
}


def reason(item: Mapping[str, Any]) -> str:
    """Why a value was refused, from one of pydantic's error records, in the words of a TOML file."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return f"must be {_PATTERNS.get(context['pattern'], 'of the form ' + context['pattern'])}"
    if kind in ("too_short", "too_long", "string_too_short", "string_too_long"):
        short = kind.endswith("short")
        unit = " characters" if kind.startswith("string") else ""
        limit = context["min_length" if short else "max_length"]
        has = context.get("actual_length", len(str(item["input"])))
        return f"must hold at {'least' if short else 'most'} {limit}{unit}, has {has}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}"
    if kind.startswith("union_tag"):
        tags = context.get("expected_tags")
        return f"must be a table whose type is one of {tags}" if tags else "must be a table with a type"
    form = _FORMS.get(kind.split("_")[0])
    if form is not None and kind.split("_")[-1] in ("type", "parsing", "float", "number", "size"):
        return f"must be {form}"
    text: str = item["msg"].removeprefix("Value error, ")
    return text.replace("Input should be ", "must be ")
