"""Structured text of other people: whatever is in it, a value or a UserError that names the file, soon and small."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lapwan.documents import Count, Number, checked, json_lines, parse_json, read_json, read_toml, read_yaml
from lapwan.errors import UserError

VALID = {
    ".json": '{"name": "a", "sizes": [1, 2, 3], "table": {"lr": 0.5, "active": true}}',
    ".toml": 'name = "a"\nsizes = [1, 2, 3]\n[table]\nlr = 0.5\nactive = true\n',
    ".yaml": "name: a\nsizes: [1, 2, 3]\ntable: {lr: 0.5, active: true}\n",
}
READERS: dict[str, Callable[[Path], Any]] = {".json": read_json, ".toml": read_toml, ".yaml": read_yaml}


def refused_forms(suffix: str) -> Iterator[tuple[str, bytes]]:
    """Contents that each reader refuses."""
    text = VALID[suffix]
    deep = "[" * 3000 + "]" * 3000
    yield "UTF-16", text.encode("utf-16")
    yield "binary", bytes(range(256))
    yield "latin", b"\xe9" + text.encode()
    yield "NUL", text.encode() + b"\0"
    yield "deep", f"a = {deep}".encode() if suffix == ".toml" else deep.encode()
    yield "unfinished", f'{text[:-1]} "'.encode()
    if suffix != ".yaml":
        yield "digits", (f"a = {'9' * 5000}" if suffix == ".toml" else '{"a": ' + "9" * 5000 + "}").encode()
        yield "a key twice", b"a = 1\na = 2" if suffix == ".toml" else b'{"a": 1, "a": 2}'
    if suffix == ".json":
        yield from (("empty", b""), ("NaN", b'{"a": NaN}'), ("infinity", b"[1e999]"), ("nested objects", (
            '{"a": ' * 200 + "1" + "}" * 200).encode()))
    if suffix == ".yaml":
        laughs = "a: &a [x, x, x]\n" + "".join(
            f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9))
        yield from (("aliases", laughs.encode()), ("itself", b"a: &a [*a]"),
                    ("code", b"!!python/object/apply:os.getcwd []"), ("hex digits", b"a: 0x" + b"f" * 5000))
    if suffix == ".toml":
        yield from (("hex digits", b"a = 0x" + b"f" * 5000), ("dotted keys", b".".join([b"a"] * 3000) + b" = 1"))


@pytest.mark.parametrize("suffix", VALID)
def test_refused_forms_name_the_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"given{suffix}"
    path.write_text(VALID[suffix], encoding="utf-8-sig")
    assert READERS[suffix](path) == json.loads(VALID[".json"])  # a byte order mark is no fault
    for name, content in refused_forms(suffix):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            READERS[suffix](path)
        message = str(caught.value)
        assert str(path) in message and len(message.splitlines()) == 1, (name, message)


@pytest.mark.parametrize("suffix", VALID)
def test_any_damage_gives_a_value_or_a_user_error(suffix: str, tmp_path: Path) -> None:
    """Seeded mutations: bytes changed, parts repeated, removed or nested."""
    random_ = random.Random(7)
    path = tmp_path / f"given{suffix}"
    for _ in range(300):
        data = bytearray(VALID[suffix].encode())
        for _ in range(random_.randint(1, 4)):
            start, end = sorted(random_.randrange(len(data) + 1) for _ in range(2))
            part = bytes(data[start:end])
            data[start:end] = random_.choice([
                b"", part * 3, random_.randbytes(len(part)), b"[" * random_.randint(1, 2000), b'"', b"\\u0000",
                b"1e400", b"-" + b"8" * random_.randint(1, 60), b"\xff", b": ", b"&a *a"])
        path.write_bytes(data)
        try:
            json.dumps(READERS[suffix](path), default=str)
        except UserError as error:
            assert str(path) in str(error), data


class Table(BaseModel):
    name: str
    size: Count
    rate: Number = 0.5
    parts: dict[str, list[Count]] = {}


WRONG = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(st.dictionaries(st.sampled_from(["name", "size", "rate", "parts", "other"]), WRONG))
def test_a_table_is_its_type_or_names_the_key(values: dict[str, Any]) -> None:
    try:
        table = checked(values, Table, "given.json")
    except UserError as error:
        message = str(error)
        assert message.startswith("given.json: ") and any(key in message for key in Table.model_fields), message
        assert len(message.splitlines()) == 1 and message.isprintable()
    else:
        assert type(table.size) is int and table.size >= 1 and type(table.rate) is float


@pytest.mark.parametrize(("values", "message"), [
    ({"name": "a"}, "given.json: 'size' is missing"),
    ({"name": "a", "size": True}, "given.json: size = True: must be a whole number"),
    ({"name": "a", "size": "4"}, "given.json: size = '4': must be a whole number"),
    ({"name": ["a"], "size": 1}, "given.json: name = a list: must be a text"),
    ({"name": "a", "size": 1, "parts": {"b": [1, 0]}},
     "given.json: parts.b[1] = 0: must be greater than or equal to 1"),
    ([], "given.json: a list: must be a table of keys and values"),
])
def test_the_line_names_key_and_value(values: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        checked(values, Table, "given.json")
    assert str(caught.value) == message


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": NaN}\n\n{"step": 2}\n{"step": ')
    assert [(number, text, value is None) for number, text, value in json_lines(path)] == [
        (1, '{"step": 1, "lr": NaN}', False), (3, '{"step": 2}', False), (4, '{"step":', True)]
    path.write_bytes(b'{"step": 1}\n' + b"x" * 2_000_000)
    with pytest.raises(UserError, match="line 2"):
        list(json_lines(path))


def test_numbers_of_json_are_those_that_fit() -> None:
    assert parse_json("[1e300, -0.0, 18446744073709551615]", "given") == [1e300, 0.0, 2**64 - 1]
    assert parse_json("[NaN]", "given", non_finite=True) != [0]


_MEASURED = """
import resource, sys, time
from pathlib import Path
import torch
from lapwan.checkpoints.container import read_header
from lapwan.checkpoints.tensors import load_pickle
from lapwan.documents import read_json, read_toml, read_yaml
from lapwan.errors import UserError
readers = {".json": read_json, ".toml": read_toml, ".yaml": read_yaml, ".safetensors": read_header, ".pth": load_pickle}
for path in map(Path, sys.argv[1:]):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        readers[path.suffix](path)
    except UserError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(path.name, round(grown), round(time.process_time() - start, 1), str(error), sep="|")
    else:
        print(path.name, "accepted", 0, "", sep="|")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is of POSIX")
def test_bombs_are_refused_small_and_soon(tmp_path: Path) -> None:
    """At most 1 GiB and 10 seconds, whatever the file would unpack to."""
    import struct
    import zipfile

    def packed(name: str, **parts: bytes) -> None:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for part, content in parts.items():
                archive.writestr(f"a/{part.replace('__', '.')}", content)

    def header(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(struct.pack("<Q", len(content)) + content)

    (tmp_path / "value.json").write_bytes(b'["' + b"x" * 50_000_000 + b'"]')
    (tmp_path / "lists.json").write_bytes(b"[" + b"[]," * 5_000_000 + b"0")
    (tmp_path / "comment.toml").write_bytes(b"#" * 50_000_000)
    (tmp_path / "flow.yaml").write_bytes(b"[" * 4_000_000)
    header("lists.safetensors", b'{"a":[' + b"[]," * 20_000_000 + b"0]}")
    header("deep.safetensors", b'{"a":' + b"[" * 9_000_000 + b"}")
    packed("zeros.pth", data__pkl=b"\x80\x02}.", data=bytes(30_000_000))
    packed("values.pth", data__pkl=b"\x80\x02" + b"]" * 5_000_000 + b".")
    (tmp_path / "old.pth").write_bytes(b"\x80\x02" + b"]" * 5_000_000 + b".")
    names = sorted(path.name for path in tmp_path.iterdir())
    ran = subprocess.run([sys.executable, "-c", _MEASURED, *(tmp_path / name for name in names)], text=True,
                         capture_output=True, check=True, env={**os.environ, "LAPWAN_UNPACK_GIB": "0.02"})
    rows = [line.split("|", 3) for line in ran.stdout.splitlines()]
    assert [row[0] for row in rows] == names
    assert all(row[1] != "accepted" and int(row[1]) <= 1024 and float(row[2]) <= 10 for row in rows), ran.stdout
