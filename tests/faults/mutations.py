"""Kinds of damage to files, by format: each is a function that replaces a valid file by a bad one, from a seed.

A file is never changed in place: inputs of a trial may be hard links. How to add a kind: a function with `@damage`
and the formats it makes sense for; `may_pass` where the command may as well succeed, because nothing need read what is
damaged.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Apply = Callable[[Path, Random], None]
DIGITS = "9" * 5000
CANARY = "executed"  # a file that hostile code makes in the working folder
MADE = 50_000_000  # bytes of a value that is far too long


@dataclass(frozen=True)
class Damage:
    """A kind of damage to files of some formats."""

    name: str
    formats: frozenset[str]
    apply: Apply
    may_pass: bool = False


DAMAGES: list[Damage] = []
TEXTS = "jsonl json toml yaml text"
TREES = "json toml"
ALL = f"{TEXTS} safetensors pickle video image"


def damage(formats: str, may_pass: bool = False) -> Callable[[Apply], Apply]:
    """Register a kind of damage."""
    def register(apply: Apply) -> Apply:
        DAMAGES.append(Damage(apply.__name__.strip("_"), frozenset(formats.split()), apply, may_pass))
        return apply
    return register


def replace(path: Path, content: bytes | str) -> None:
    """Put another file in the place of one."""
    _remove(path)
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- any file


@damage(ALL)
def missing(path: Path, rng: Random) -> None:
    _remove(path)


@damage(ALL)
def empty(path: Path, rng: Random) -> None:
    replace(path, b"")


@damage(ALL)
def zeros(path: Path, rng: Random) -> None:
    replace(path, bytes(path.stat().st_size or 100))


@damage(ALL)
def random_bytes(path: Path, rng: Random) -> None:
    replace(path, b"\xff\xfe\x00" + rng.randbytes(500))


@damage("json safetensors pickle video image")
def truncated(path: Path, rng: Random) -> None:
    data = path.read_bytes()
    replace(path, data[: rng.randrange(1, max(2, len(data) // 2))])


@damage(ALL, may_pass=True)
def flipped_bits(path: Path, rng: Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(8):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


@damage("safetensors", may_pass=True)
def flipped_bits_of_the_header(path: Path, rng: Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(3):
        data[rng.randrange(min(len(data), 8 + _header(path)[1]))] ^= 1 << rng.randrange(8)
    replace(path, bytes(data))


@damage(ALL)
def folder_in_its_place(path: Path, rng: Random) -> None:
    _remove(path)
    path.mkdir()


@damage(ALL)
def link_to_itself(path: Path, rng: Random) -> None:
    _remove(path)
    path.symlink_to(path.name)


@damage(ALL)
def link_to_nowhere(path: Path, rng: Random) -> None:
    _remove(path)
    path.symlink_to("nowhere/at all")


@damage(ALL)
def endless(path: Path, rng: Random) -> None:
    _remove(path)
    path.symlink_to("/dev/zero")


@damage("safetensors pickle json toml jsonl image video")
def lfs_pointer(path: Path, rng: Random) -> None:
    replace(path, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258"
                  "daaa5e2ca24d17e2393\nsize 12345\n")


@damage("safetensors pickle json toml jsonl image video")
def html_page(path: Path, rng: Random) -> None:
    replace(path, "<!DOCTYPE html>\n<html><body>401 Unauthorized</body></html>\n")


@damage("text yaml", may_pass=True)
def html_text(path: Path, rng: Random) -> None:
    replace(path, "<!DOCTYPE html>\n<html><body>401: Unauthorized</body></html>\n")


# ---- texts


@damage("jsonl yaml", may_pass=True)
def another_encoding(path: Path, rng: Random) -> None:
    """Which lapwan may recognise."""
    replace(path, path.read_text("utf-8").encode(rng.choice(["utf-16", "utf-16-le", "gb18030", "big5"]), "replace"))


@damage("toml")
def utf_16(path: Path, rng: Random) -> None:
    replace(path, path.read_text("utf-8").encode("utf-16"))


@damage("jsonl", may_pass=True)
def line_of_another_encoding(path: Path, rng: Random) -> None:
    not_utf_8(path, rng)


@damage("toml")
def not_utf_8(path: Path, rng: Random) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = lines[at].rstrip(b"\n") + b"# \xb5\xff\xe9\n"
    replace(path, b"".join(lines))


@damage("jsonl json toml yaml")
def nul_bytes(path: Path, rng: Random) -> None:
    text = path.read_text("utf-8")
    at = rng.randrange(1, len(text) - 1)
    replace(path, text[:at].rstrip('"') + "\0" + text[at:])


@damage("jsonl json yaml text")
def long_value(path: Path, rng: Random) -> None:
    start = path.read_text("utf-8")[:1].replace("#", "")
    replace(path, start + '{"caption": "' + "剪" * (MADE // 3))


@damage("toml")
def long_toml_value(path: Path, rng: Random) -> None:
    replace(path, 'model = "' + "x" * MADE + '"\n')


@damage("jsonl json yaml")
def nested(path: Path, rng: Random) -> None:
    replace(path, "[" * 200_000)


@damage("jsonl json")
def nested_and_closed(path: Path, rng: Random) -> None:
    replace(path, '{"caption": ' + "[" * 3000 + "]" * 3000 + "}\n")


@damage("toml")
def nested_toml(path: Path, rng: Random) -> None:
    replace(path, "model = " + "[" * 3000 + "]" * 3000 + "\n")


@damage("toml")
def nested_toml_tables(path: Path, rng: Random) -> None:
    replace(path, "[" + ".".join(["a"] * 3000) + "]\nx = 1\n")


@damage("jsonl json")
def not_a_table(path: Path, rng: Random) -> None:
    replace(path, rng.choice(["[1, 2, 3]", "7", '"text"', "null", "true", "[[]]"]) + "\n")


@damage("jsonl json toml yaml")
def digits(path: Path, rng: Random) -> None:
    replace(path, f"steps = {DIGITS}\n" if path.suffix == ".toml" else
            f"prompts: [{DIGITS}]\n" if path.suffix in (".yaml", ".yml") else f'{{"caption": {DIGITS}}}\n')


@damage("toml")
def cut_toml(path: Path, rng: Random) -> None:
    lines = path.read_text("utf-8").splitlines(keepends=True)
    replace(path, "".join(lines[: rng.randrange(1, len(lines))]) + 'name = "unfini')


@damage("toml")
def toml_key_twice(path: Path, rng: Random) -> None:
    replace(path, "zz = 1\nzz = 2\n" + path.read_text("utf-8"))


@damage("toml")
def toml_unknown_key(path: Path, rng: Random) -> None:
    replace(path, 'no_such_key = "x"\n' + path.read_text("utf-8"))


@damage("toml")
def toml_key_with_controls(path: Path, rng: Random) -> None:
    replace(path, '"no\\n\\u001b[31m\\u0007such" = 1\n' + path.read_text("utf-8"))


@damage("toml")
def toml_key_of_a_megabyte(path: Path, rng: Random) -> None:
    replace(path, "k" * 1_000_000 + " = 1\n" + path.read_text("utf-8"))


@damage("toml")
def toml_text_as_number(path: Path, rng: Random) -> None:
    """Every value of the type it must not have."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    replace(path, "".join(
        line.split("=")[0] + "= 1979-05-27T07:32:00Z\n" if "=" in line and not line.startswith(("#", " "))
        and line.rstrip()[-1] not in "[({" else line for line in lines))


@damage("toml")
def toml_table_as_list(path: Path, rng: Random) -> None:
    text = path.read_text("utf-8")
    tables = [line for line in text.splitlines() if line.startswith("[")]
    line = rng.choice(tables) if tables else ""
    name = line.strip("[]") or "data"
    replace(path, f"{name.split('.')[0]} = [1, 2]\n" + text.split("\n[")[0].split("[data]")[0] + "\n")


# ---- JSONL


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def _dump(path: Path, rows: list[Any]) -> None:
    replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _edit(name: str, edit: Callable[[dict[str, Any], Random], Any], may_pass: bool = False,
          formats: str = "clips", line: int | None = None) -> None:
    """Register a change of one line of a JSONL file."""
    def apply(path: Path, rng: Random) -> None:
        rows = _rows(path)
        at = rng.randrange(len(rows)) if line is None else line
        made = edit(rows[at], rng)
        rows[at] = rows[at] if made is None else made
        _dump(path, rows)
    DAMAGES.append(Damage(name, frozenset(formats.split()), apply, may_pass))


def _set(key: str, value: Any) -> Callable[[dict[str, Any], Random], Any]:
    return lambda row, rng: {**row, key: value}


@damage("jsonl")
def cut_in_a_line(path: Path, rng: Random) -> None:
    data = path.read_text("utf-8").rstrip()
    replace(path, data[:-1])


@damage("jsonl")
def line_that_is_a_list(path: Path, rng: Random) -> None:
    replace(path, path.read_text("utf-8") + "[1, 2]\n")


@damage("clips index", may_pass=True)
def nan_in_a_line(path: Path, rng: Random) -> None:
    replace(path, path.read_text("utf-8").rstrip()[:-1] + ', "facts": {"fps": NaN}, "roi": [Infinity]}\n')


@damage("clips")
def lone_surrogate(path: Path, rng: Random) -> None:
    replace(path, path.read_text("utf-8") + '{"caption": "\\ud800 ", "video_path": "\\udcff.mp4"}\n')


@damage("clips")
def only_blank_lines(path: Path, rng: Random) -> None:
    replace(path, "\n  \n\t\n" * 5)


for _value in (None, 7, 1.5, True, [], {}, ["a"], ""):
    _edit(f"caption_{type(_value).__name__}_{_value!s:.3}".rstrip("_"), _set("caption", _value))
_edit("no_caption", lambda row, rng: {k: v for k, v in row.items() if k != "caption"})
for _value in (None, 7, [], {}, "../../../../nowhere.mp4", "a\nb.mp4", "x" * 5000 + ".mp4", "\0.mp4", ".", "/dev/zero",
               "/proc/self/mem", "~/x.mp4", "file:///x.mp4", "\x1b[31mred.mp4"):
    _edit(f"video_path_{_value!s:.12}".replace("\n", "newline").replace("\0", "nul").replace("\x1b", "escape"),
          _set("video_path", _value), formats="media")
for _value in (7, "x", [[]], [{"frame": -1, "box": [0, 0, 1, 1]}], [{"frame": 0, "box": [9, 9, -9]}],
               [{"frame": 10**30, "box": [0, 0, 1, 1]}], [{"box": "x"}], {"frame": 0}):
    _edit(f"roi_{_value!s:.20}", _set("roi", _value), may_pass=True, formats="media")
for _value in (7, [], {}, "no such split\n"):
    _edit(f"split_{_value!s:.10}".strip(), _set("split", _value), may_pass=True, formats="media")
for _value in ("x", 99, -1, 1e300, [], {}, True):
    _edit(f"instrument_label_{_value!s:.8}", _set("instrument_label", _value), may_pass=True, formats="media")
for _value in ("x", [1], ["a", "b", "c", "d"], [1e308] * 4, [-1, 0, 0, 0], [0, 0, 0, 0], {}, [1] * 1000):
    _edit(f"instrument_logits_{_value!s:.16}", _set("instrument_logits", _value), may_pass=True, formats="media")


# ---- lapwan's own index of a cache, and metrics.jsonl


for _key in ("latents", "text", "roi"):
    for _value in ("../clips/clip0.mp4", "/etc/passwd", "", ".", 7, [], {}, "a\nb", "nowhere.safetensors", "x" * 300):
        _edit(f"{_key}_{_value!s:.14}".replace("\n", "newline"), _set(_key, _value), formats="index", line=1)
for _key in ("frames", "height", "width", "repeats", "start"):
    for _value in ("x", None, -5, 1.5, 10**30, [], True):
        _edit(f"{_key}_{_value!s:.8}", _set(_key, _value), formats="index", line=1, may_pass=_value is True)
for _key in ("id", "caption", "label", "label_weights", "fallback", "split", "facts", "fingerprints", "condition",
             "probe", "clip"):
    for _value in (7, {"a": [1]}, [None], "x"):
        _edit(f"{_key}_{_value!s:.8}", _set(_key, _value), formats="index", line=1, may_pass=True)
for _key in ("id", "latents", "text", "caption", "frames", "height", "width"):
    _edit(f"no_{_key}", lambda row, rng, key=_key: {k: v for k, v in row.items() if k != key}, formats="index", line=1)
_edit("unknown_key_of_an_item", _set("no\nsuch", 1), formats="index", line=1, may_pass=True)  # of a newer version
for _key, _values in {"lapwan_index": (0, "x", None, [], 10**30), "fps": ("x", [], -1), "task": (7, [], "x"),
                      "text_dim": ("x", -1, [], 7), "prompts": ("../x", 7, [], "nowhere.safetensors"),
                      "taxonomy": (7, [], "no such")}.items():
    for _value in _values:
        _edit(f"head_{_key}_{_value!s:.12}", _set(_key, _value), formats="index", line=0,
              may_pass=_key in ("fps", "taxonomy") or "nowhere" in str(_value))  # not every run needs the prompts


@damage("index")
def item_twice(path: Path, rng: Random) -> None:
    rows = _rows(path)
    _dump(path, [*rows, rows[1]])


@damage("index")
def head_alone(path: Path, rng: Random) -> None:
    _dump(path, _rows(path)[:1])


@damage("index")
def head_missing(path: Path, rng: Random) -> None:
    _dump(path, _rows(path)[1:])


@damage("index metrics", may_pass=True)
def cut_last_line(path: Path, rng: Random) -> None:
    replace(path, path.read_text("utf-8")[:-30])


for _key, _value in (("step", "x"), ("step", None), ("step", 10**30), ("step", -1), ("step", 1.5), ("step", []),
                     ("noise_expert", 7), ("noise_expert", "x\ny"), ("loss", "x"), ("loss", []), ("loss", 10**400),
                     ("lr", {}), ("lr", "x"), ("grad_norm", []), ("no\x1bsuch", [])):
    _edit(f"metrics_{_key}_{_value!s:.8}".replace("\x1b", "esc").replace("\n", "newline"), _set(_key, _value),
          may_pass=True, formats="metrics")
_edit("metrics_row_without_step", lambda row, rng: {"loss": 1}, may_pass=True, formats="metrics")
_edit("metrics_row_is_a_number", lambda row, rng: 7, may_pass=True, formats="metrics")
_edit("metrics_row_is_a_list", lambda row, rng: [row], may_pass=True, formats="metrics")


# ---- JSON of a model


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in (*_leaves(value, (*path, key)), (*path, key))]
    return []


def set_leaf(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Replace one value of a JSON tree."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = copy.deepcopy(value)  # the same table at two depths would hold itself


def _json_values(name: str, value: Any) -> None:
    def apply(path: Path, rng: Random) -> None:
        document = json.loads(path.read_text("utf-8"))
        leaves = _leaves(document)
        for leaf in rng.sample(leaves, min(3, len(leaves))):
            try:
                set_leaf(document, leaf, value)
            except (TypeError, KeyError, IndexError):  # below a value that has been replaced
                continue
        replace(path, json.dumps(document))
    DAMAGES.append(Damage(f"values_{name}", frozenset({"json"}), apply, may_pass=True))


for _name, _value in {"null": None, "text": "x\n\x1b[31m", "list": [[]], "table": {"a": 1}, "negative": -1, "zero": 0,
                      "huge": 10**12, "float": 1.5, "nan": float("nan"), "infinite": float("inf"), "true": True,
                      "long": "x" * 100_000, "integer_of_400_digits": 10**399}.items():
    _json_values(_name, _value)


@damage("json", may_pass=True)
def key_removed(path: Path, rng: Random) -> None:
    document = json.loads(path.read_text("utf-8"))
    for _ in range(2):
        if isinstance(document, dict) and document:
            del document[rng.choice(list(document))]
    replace(path, json.dumps(document))


@damage("json", may_pass=True)
def number_of_5000_digits(path: Path, rng: Random) -> None:
    document = json.loads(path.read_text("utf-8"))
    if leaves := _leaves(document):
        set_leaf(document, rng.choice(leaves), "@digits@")
    else:
        document = {"a": "@digits@"}
    replace(path, json.dumps(document).replace('"@digits@"', DIGITS))


@damage("yaml")
def yaml_aliases(path: Path, rng: Random) -> None:
    """A billion words from nine lines."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    replace(path, "\n".join([*lines, "prompts: *a9"]) + "\n")


@damage("yaml")
def yaml_object(path: Path, rng: Random) -> None:
    replace(path, f"prompts: !!python/object/apply:os.system ['touch {CANARY}']\n")


@damage("yaml")
def yaml_of_another_shape(path: Path, rng: Random) -> None:
    replace(path, rng.choice(["prompts: {a: 1}\n", "7\n", "prompts: [[x]]\n", "prompts:\n- caption: [1]\n", "- 7\n"]))


# ---- safetensors


def _header(path: Path) -> tuple[dict[str, Any], int, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), length, data[8 + length :]


def write_raw(path: Path, header: bytes, body: bytes, length: int | None = None) -> None:
    """A safetensors file of these bytes, right or wrong."""
    replace(path, struct.pack("<Q", len(header) if length is None else length) + header + body)


def _header_edit(name: str, edit: Callable[[dict[str, Any], list[str], Random], None], may_pass: bool = False,
                 formats: str = "safetensors") -> None:
    def apply(path: Path, rng: Random) -> None:
        header, _, body = _header(path)
        edit(header, [key for key in header if key != "__metadata__"], rng)
        write_raw(path, json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass"), body)
    DAMAGES.append(Damage(name, frozenset(formats.split()), apply, may_pass))


def _field(key: str, value: Any) -> Callable[[dict[str, Any], list[str], Random], None]:
    def edit(header: dict[str, Any], names: list[str], rng: Random) -> None:
        header[rng.choice(names)][key] = value
    return edit


for _value in ("F7", "", None, 7, [], "f32", "F4_X", "BOOL\n"):
    _header_edit(f"dtype_{_value!s:.6}".strip(), _field("dtype", _value))
for _value in ([-1, 4], "x", None, [1.5], [[1]], {}, [10**20, 10**20], [2**63], [True], 7, [0]):
    _header_edit(f"shape_{_value!s:.12}", _field("shape", _value))
for _value in ([0], [0, 1, 2], "x", None, [8, 0], [-8, 0], [0, 10**18], [1.5, 2.5], [0, "x"], {}, [2**63, 2**64],
               [0, 0]):
    _header_edit(f"data_offsets_{_value!s:.14}", _field("data_offsets", _value))
for _key in ("dtype", "shape", "data_offsets"):
    _header_edit(f"no_{_key}_in_the_header", lambda header, names, rng, key=_key: header[rng.choice(names)].pop(key) and
                 None)
for _value in (None, 7, [], "x"):
    _header_edit(f"entry_{_value!s:.5}", lambda header, names, rng, value=_value: header.update(
        {rng.choice(names): value}))
for _value in (7, [], "x", {"a": 1}, {"a": None}, {"a": {"b": "c"}}):
    _header_edit(f"metadata_{_value!s:.12}", lambda header, names, rng, value=_value: header.update(
        {"__metadata__": value}), may_pass=True)
_header_edit("no_tensors", lambda header, names, rng: [header.pop(name) for name in names] and None)
_header_edit("overlap", lambda header, names, rng: header.update({"one.more": dict(header[names[0]])}))
_header_edit("name_with_controls", lambda header, names, rng: header.update(
    {"a\n\x1b[31m\u202e" + names[-1]: header.pop(names[-1])}), may_pass=True)
_header_edit("name_of_100_kB", lambda header, names, rng: header.update(
    {"n" * 100_000: header.pop(names[-1])}), may_pass=True)
_header_edit("name_with_folders", lambda header, names, rng: header.update(
    {"../../" + names[-1]: header.pop(names[-1])}), may_pass=True)
_header_edit("metadata_of_lapwan", lambda header, names, rng: header.update({"__metadata__": {
    key: rng.choice(["{", "[]", "null", "7", '{"a": ' + DIGITS + "}", "[" * 3000, "NaN", "x" * 1000])
    for key in header.get("__metadata__", {"lapwan.x": ""})}}), may_pass=True)


@damage("safetensors")
def header_length_beyond_the_file(path: Path, rng: Random) -> None:
    header, _, body = _header(path)
    write_raw(path, json.dumps(header).encode(), body, rng.choice([2**63, 2**64 - 1, 10**9, 10**12]))


@damage("safetensors")
def header_length_too_short(path: Path, rng: Random) -> None:
    header, length, body = _header(path)
    write_raw(path, json.dumps(header).encode(), body, rng.choice([0, 1, length // 2]))


@damage("safetensors")
def header_not_json(path: Path, rng: Random) -> None:
    write_raw(path, rng.choice([b"[]", b"7", b"null", b'"x"', b"{'a': 1}", b"\xff" * 20, b"{}" * 3]), b"")


@damage("safetensors")
def header_nested(path: Path, rng: Random) -> None:
    depth = rng.choice([500, 3000, 200_000])
    write_raw(path, b'{"a": ' + b"[" * depth + b"]" * depth + b"}", b"")


@damage("safetensors")
def header_with_digits(path: Path, rng: Random) -> None:
    entry = f'{{"dtype": "F32", "shape": [{DIGITS}], "data_offsets": [0, {DIGITS}]}}'
    write_raw(path, f'{{"a": {entry}}}'.encode(), b"1234")


@damage("safetensors")
def header_of_50_megabytes(path: Path, rng: Random) -> None:
    write_raw(path, b'{"__metadata__": {"a": "' + b"x" * MADE, b"")


@damage("safetensors", may_pass=True)  # the library's own reader takes it
def name_twice(path: Path, rng: Random) -> None:
    header, _, body = _header(path)
    name, entry = next((k, v) for k, v in header.items() if k != "__metadata__")
    text = json.dumps(header)
    write_raw(path, (text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}").encode(), body)


@damage("safetensors")
def gap(path: Path, rng: Random) -> None:
    header, _, body = _header(path)
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    header[last]["data_offsets"] = [offset + 64 for offset in header[last]["data_offsets"]]
    write_raw(path, json.dumps(header).encode(), body + bytes(64))


@damage("safetensors")
def trailing_bytes(path: Path, rng: Random) -> None:
    replace(path, path.read_bytes() + b"\0" * 100)


@damage("safetensors")
def one_byte_short(path: Path, rng: Random) -> None:
    replace(path, path.read_bytes()[:-1])


@damage("safetensors")
def pickle_named_safetensors(path: Path, rng: Random) -> None:
    replace(path, hostile_pickle(rng))


# ---- LoRAs and mixtures: valid files of wrong contents


def _tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _write_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    replace(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def _tensor_edit(name: str, formats: str, edit: Callable[[dict[str, Any], Random], Any],
                 may_pass: bool = False) -> None:
    def apply(path: Path, rng: Random) -> None:
        tensors, metadata = _tensors(path)
        edit(tensors, rng)
        _write_tensors(path, tensors, metadata)
    DAMAGES.append(Damage(name, frozenset(formats.split()), apply, may_pass))


def _some(tensors: dict[str, Any], rng: Random, end: str = "weight") -> str:
    return rng.choice([name for name in sorted(tensors) if name.endswith(end)] or sorted(tensors))


def _fill(value: float) -> Callable[[dict[str, Any], Random], Any]:
    return lambda tensors, rng: tensors[_some(tensors, rng)].view(-1)[:1].fill_(value)


def _convert(dtype: str) -> Callable[[dict[str, Any], Random], Any]:
    def edit(tensors: dict[str, Any], rng: Random) -> None:
        import torch

        tensors.update({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()})
    return edit


_tensor_edit("nan", "lora", _fill(float("nan")))
_tensor_edit("infinite", "lora", _fill(float("inf")))
_tensor_edit("largest_float", "lora", lambda tensors, rng: [t.fill_(3e38) for n, t in tensors.items()
                                                            if n.endswith("weight")])
_tensor_edit("nan_in_the_cache", "cached", lambda tensors, rng: [t.fill_(float("nan")) for t in tensors.values()],
             may_pass=True)
_tensor_edit("integers", "lora", _convert("int32"))
_tensor_edit("booleans", "lora", _convert("bool"))
_tensor_edit("integers_in_the_cache", "cached", _convert("int32"), may_pass=True)
_tensor_edit("alpha_nan", "lora", lambda tensors, rng: tensors[_some(tensors, rng, ".alpha")].fill_(float("nan")))
_tensor_edit("alpha_zero", "lora", lambda tensors, rng: [t.fill_(0.0) for n, t in tensors.items() if
                                                         n.endswith(".alpha")], may_pass=True)
_tensor_edit("alpha_is_a_matrix", "lora", lambda tensors, rng: tensors.update(
    {(name := _some(tensors, rng, ".alpha")): tensors[name].repeat(2, 2)}))
_tensor_edit("half_of_a_pair", "lora", lambda tensors, rng: tensors.pop(_some(tensors, rng, "lora_B.weight")))
_tensor_edit("other_half_of_a_pair", "lora", lambda tensors, rng: tensors.pop(_some(tensors, rng, "lora_A.weight")))
_tensor_edit("transposed", "lora", lambda tensors, rng: tensors.update(
    {(name := _some(tensors, rng)): tensors[name].T}))
_tensor_edit("a_row_less", "lora", lambda tensors, rng: tensors.update(
    {(name := _some(tensors, rng, "lora_A.weight")): tensors[name][:-1]}))
_tensor_edit("no_rank", "lora", lambda tensors, rng: tensors.update({
    (name := _some(tensors, rng, "lora_A.weight")): tensors[name][:0],
    (other := name.replace("lora_A", "lora_B")): tensors[other][:, :0]}))
_tensor_edit("another_width", "lora", lambda tensors, rng: tensors.update(
    {(name := _some(tensors, rng, "lora_A.weight")): tensors[name].repeat(1, 2)}))
_tensor_edit("one_dimension", "lora", lambda tensors, rng: tensors.update(
    {(name := _some(tensors, rng)): tensors[name].flatten()}))
_tensor_edit("names_of_no_model", "lora", lambda tensors, rng: [tensors.update({f"x.{name}": tensors.pop(name)}) for
                                                                name in sorted(tensors)], may_pass=True)
_tensor_edit("tensor_missing", "mixture state weights", lambda tensors, rng: tensors.pop(rng.choice(sorted(tensors))))
_tensor_edit("tensor_of_another_shape", "mixture state weights", lambda tensors, rng: tensors.update(
    {(name := rng.choice([n for n in sorted(tensors) if tensors[n].ndim > 0])): tensors[name].repeat(
        *[2] * tensors[name].ndim)}))
_tensor_edit("tensor_too_many", "mixture state", lambda tensors, rng: tensors.update(
    {"no.such": tensors[rng.choice(sorted(tensors))].clone()}), may_pass=True)
_tensor_edit("nan_in_it", "mixture state", lambda tensors, rng: [t.fill_(float("nan")) for t in tensors.values()
                                                                 if t.is_floating_point()], may_pass=True)
_tensor_edit("cached_shape", "cached", lambda tensors, rng: tensors.update(
    {(name := rng.choice(sorted(tensors))): tensors[name][..., :-1]}), may_pass=True)
_tensor_edit("cached_dimension", "cached", lambda tensors, rng: tensors.update(
    {(name := rng.choice(sorted(tensors))): tensors[name].flatten()}), may_pass=True)
_tensor_edit("cached_key", "cached", lambda tensors, rng: tensors.update(
    {"x": tensors.pop(rng.choice(sorted(tensors)))}), may_pass=True)


@damage("mixture")
def no_metadata(path: Path, rng: Random) -> None:
    tensors, _ = _tensors(path)
    _write_tensors(path, tensors, {})


def _metadata_edit(name: str, edit: Callable[[Any, Random], Any], may_pass: bool = True) -> None:
    """Change the JSON in a mixture's metadata."""
    def apply(path: Path, rng: Random) -> None:
        tensors, metadata = _tensors(path)
        keys = [key for key, text in metadata.items() if text[:1] in "{["]
        for key in keys or list(metadata):
            try:
                metadata[key] = json.dumps(edit(json.loads(metadata[key]), rng))
            except ValueError:
                metadata[key] = "{"
        _write_tensors(path, tensors, metadata)
    DAMAGES.append(Damage(name, frozenset({"mixture"}), apply, may_pass))


def _drop(tree: Any, rng: Random) -> Any:
    return {k: v for k, v in tree.items() if k != rng.choice(sorted(tree))} if isinstance(tree, dict) and tree else 7


def _wrong(value: Any) -> Callable[[Any, Random], Any]:
    def edit(tree: Any, rng: Random) -> Any:
        if isinstance(tree, dict) and tree:
            set_leaf(tree, rng.choice(_leaves(tree)), value)
            return tree
        return value
    return edit


_metadata_edit("metadata_is_a_list", lambda tree, rng: [tree], may_pass=False)
_metadata_edit("metadata_is_a_number", lambda tree, rng: 7, may_pass=False)
_metadata_edit("metadata_key_removed", _drop)
for _name, _value in {"null": None, "text": "x\ny", "list": [[]], "table": {"a": 1}, "number": -1, "huge": 10**300,
                      "float": 1e308, "empty": ""}.items():
    _metadata_edit(f"metadata_value_{_name}", _wrong(_value))


# ---- pickles


class _Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class _HostileEval:
    def __reduce__(self) -> Any:
        return eval, (f"open({CANARY!r}, 'w')",)


def hostile_pickle(rng: Random) -> bytes:
    """A pickle that runs a command when it is loaded."""
    return pickle.dumps(rng.choice([_Hostile(f"touch {CANARY}"), {"a": [_HostileEval()]}]), rng.choice([0, 2, 4]))


def torch_zip(path: Path, pickled: bytes, more: dict[str, bytes] | None = None) -> None:
    """A file as torch.save lays it out, around this pickle."""
    _remove(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in {"archive/data.pkl": pickled, "archive/version": b"3\n", "archive/byteorder": b"little",
                           **(more or {})}.items():
            file.writestr(name, data)


@damage("pickle")
def hostile(path: Path, rng: Random) -> None:
    replace(path, hostile_pickle(rng))


@damage("pickle")
def hostile_in_a_zip(path: Path, rng: Random) -> None:
    torch_zip(path, hostile_pickle(rng))


@damage("pickle")
def pickle_in_a_loop(path: Path, rng: Random) -> None:
    torch_zip(path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


@damage("pickle")
def zip_bomb(path: Path, rng: Random) -> None:
    """A gigabyte and a half of zeros in 1.5 MB, as a tensor's storage."""
    import torch

    torch.save({"a": torch.zeros(4)}, path.with_name("small.pt"))
    with zipfile.ZipFile(path.with_name("small.pt")) as small:
        parts = {name: small.read(name) for name in small.namelist()}
    path.with_name("small.pt").unlink()
    _remove(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, data in parts.items():
            if "/data/" in name:
                with file.open(name, "w", force_zip64=True) as stream:
                    for _ in range(1500):
                        stream.write(bytes(2**20))
            else:
                file.writestr(name, data)


@damage("pickle")
def huge_tensor(path: Path, rng: Random) -> None:
    """A pickle that asks for a tensor of 80 GB and holds none of it."""
    import torch

    torch.save({"a": torch.zeros(1).expand(20_000_000_000)}, path.with_name("expanded.pt"))
    data = path.with_name("expanded.pt").read_bytes()
    path.with_name("expanded.pt").unlink()
    replace(path, data)


@damage("pickle")
def pickle_of_a_list(path: Path, rng: Random) -> None:
    import torch

    _remove(path)
    torch.save(rng.choice([[1, 2], 7, "x", None, {}, {7: 8}]), path)


def _rest_edit(name: str, edit: Callable[[dict[str, Any], Random], Any]) -> None:
    """Change the rest of a checkpoint's state."""
    def apply(path: Path, rng: Random) -> None:
        import torch

        rest = torch.load(path, weights_only=True)
        edit(rest, rng)
        _remove(path)
        torch.save(rest, path)
    DAMAGES.append(Damage(name, frozenset({"rest"}), apply, may_pass=True))


def _any_leaf(value: Any, depth: int) -> Callable[[dict[str, Any], Random], Any]:
    def edit(rest: dict[str, Any], rng: Random) -> None:
        leaves = [leaf for leaf in _leaves(rest) if len(leaf) == depth] or [(next(iter(rest)),)]
        set_leaf(rest, rng.choice(leaves), value)
    return edit


for _depth in (1, 2, 3):
    for _name, _value in {"null": None, "text": "x", "list": [1], "table": {"a": 1}, "number": -1, "huge": 10**30,
                          "float": float("nan")}.items():
        _rest_edit(f"rest_{_name}_at_depth_{_depth}", _any_leaf(_value, _depth))
    _rest_edit(f"rest_key_removed_at_depth_{_depth}", lambda rest, rng, depth=_depth: _remove_leaf(
        rest, rng.choice([leaf for leaf in _leaves(rest) if len(leaf) == depth] or [(next(iter(rest)),)])))


def _remove_leaf(tree: Any, path: tuple[Any, ...]) -> None:
    for key in path[:-1]:
        tree = tree[key]
    del tree[path[-1]]


# ---- shard maps


def _shards(name: str, weight_map: Any, may_pass: bool = False) -> None:
    def apply(path: Path, rng: Random) -> None:
        """`path` is a model's weights: they become one shard, and an index names it."""
        header, _, _ = _header(path)
        names = [key for key in header if key != "__metadata__"]
        shard = path.with_name("diffusion_pytorch_model-00001-of-00001.safetensors")
        path.replace(shard)
        mapped = weight_map(names, shard.name) if callable(weight_map) else weight_map
        path.with_name(path.name + ".index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}), encoding="utf-8")
    DAMAGES.append(Damage(f"shards_{name}", frozenset({"shards"}), apply, may_pass))


_shards("outside", lambda names, shard: dict.fromkeys(names, "../../outside/victim.safetensors"))
_shards("absolute", lambda names, shard: dict.fromkeys(names, "/etc/passwd"))
_shards("missing", lambda names, shard: dict.fromkeys(names, "nowhere.safetensors"))
_shards("one_missing", lambda names, shard: {**dict.fromkeys(names, shard), names[0]: "nowhere.safetensors"})
_shards("not_in_it", lambda names, shard: {**dict.fromkeys(names, shard), "no.such.weight": shard}, may_pass=True)
_shards("list", [1, 2])
_shards("numbers", lambda names, shard: dict.fromkeys(names, 7))
_shards("newline", lambda names, shard: dict.fromkeys(names, "a\nb"))
_shards("empty", {})
_shards("folder", lambda names, shard: dict.fromkeys(names, "."))


# ---- images and videos


def png(width: int, height: int, rows: int, body: bytes | None = None) -> bytes:
    """A PNG whose header gives this size, of `rows` black rows."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    line = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed if body is None else body) + chunk(
        b"IEND", b"")


@damage("image")
def image_bomb(path: Path, rng: Random) -> None:
    replace(path, png(40_000, 40_000, 40_000))


@damage("image")
def image_that_says_it_is_a_bomb(path: Path, rng: Random) -> None:
    replace(path, png(2**31 - 1, 2**31 - 1, 1))


@damage("image")
def image_of_no_size(path: Path, rng: Random) -> None:
    replace(path, png(0, 5, 1))


@damage("image")
def image_without_pixels(path: Path, rng: Random) -> None:
    replace(path, png(100, 100, 0, body=b"\0\1\2"))


@damage("image")
def image_is_a_text(path: Path, rng: Random) -> None:
    replace(path, "<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>")


@damage("image")
def image_text_bomb(path: Path, rng: Random) -> None:
    """A compressed text chunk of 300 MB."""
    packed = zlib.compress(bytes(300_000_000), 9)
    data = b"Comment\0\0" + packed
    text = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = png(64, 64, 64)
    replace(path, whole[:33] + text + whole[33:])


@damage("video")
def video_without_frames(path: Path, rng: Random) -> None:
    data = path.read_bytes()
    at = data.find(b"mdat")
    size = struct.unpack(">I", data[at - 4 : at])[0]
    replace(path, data[: at + 4] + bytes(size - 8) + data[at - 4 + size :])


@damage("video")
def video_index_alone(path: Path, rng: Random) -> None:
    data = path.read_bytes()
    at = data.find(b"moov")
    replace(path, data[at - 4 :])


@damage("video", may_pass=True)
def video_header_flipped(path: Path, rng: Random) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"moov")
    for _ in range(10):
        data[at + rng.randrange(8, len(data) - at)] = rng.randrange(256)
    replace(path, bytes(data))


@damage("video")
def video_of_65535_pixels(path: Path, rng: Random) -> None:
    """The header's sizes, not the frames'."""
    data = bytearray(path.read_bytes())
    at = data.find(b"avc1") + 4
    data[at + 24 : at + 28] = b"\xff\xff\xff\xff"
    at = data.find(b"avcC") + 4
    data[at + 12 : at + 24] = rng.randbytes(12)
    replace(path, bytes(data))


@damage("video")
def sound_alone(path: Path, rng: Random) -> None:
    samples = bytes(32_000)
    replace(path, b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVEfmt " + struct.pack(
        "<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16) + b"data" + struct.pack("<I", len(samples)) + samples)
