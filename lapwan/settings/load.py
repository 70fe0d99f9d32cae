"""From TOML, environment, --set and options to validated settings; every problem is reported with its source.

Precedence, strongest first: options, `--set section.key=value`, environment `LAPWAN_SECTION__KEY`, TOML, default.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from lapwan.documents import TOML_BYTES, parse_toml, read_text, reason
from lapwan.errors import UserError
from lapwan.settings.aliases import (
    RUN_HEADER,
    SETTINGS_VERSION,
    VERSION_KEY,
    accepted_keys,
    current_key,
    current_keys,
    older_key,
    other_form,
    suggestion,
    with_old_defaults,
)
from lapwan.settings.base import Settings, flag_fields

S = TypeVar("S", bound=Settings)
_PREFIX = "LAPWAN_"


def load(
    model: type[S],
    config: Path | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> S:
    """Merge the four sources by precedence and validate the result as `model`.

    Args:
        config: a TOML file.
        sets: `section.key=value` texts; the value is read as TOML if it parses, else as a string.
        options: dotted key -> value, from the command line.
        environment: defaults to os.environ; only `LAPWAN_*` names that are fields of `model` count.

    Raises:
        UserError: all problems at once, each with its value and its source.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    text = ""
    if config is not None:
        text = _read(config)
        tree = upgraded(_parse(text, config), config, run=text.startswith(RUN_HEADER))
    for key, (name, value) in _from_environment(model, os.environ if environment is None else environment).items():
        _put(tree, key, value, f"environment {name}", sources)
    for item in sets:
        key, value = _parse_set(item)
        _put(tree, current_key(key), value, f"--set {key}", sources)
    flags = {field.key: field.long_name for field in flag_fields(model)}
    for key, value in (options or {}).items():
        _put(tree, current_key(key), value, flags.get(key, key), sources)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _explained(error, model, config, text, sources) from None


def upgraded(tree: dict[str, Any], path: Path, run: bool = False) -> dict[str, Any]:
    """A settings file's content under today's names; for a run's settings also with the defaults of their version.

    Args:
        run: the file is a run's even if it holds no version.

    Raises:
        UserError: a key is given under two names, or the settings are a newer lapwan's.
    """
    version = tree.pop(VERSION_KEY, None)
    if version is not None and (type(version) is not int or not 1 <= version <= SETTINGS_VERSION):
        raise UserError(f"{path}: {VERSION_KEY} = {version!r}: this version of lapwan reads 1 to {SETTINGS_VERSION}; "
                        "install a newer one")
    try:
        tree = current_keys(tree)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return with_old_defaults(tree, version or 1) if run or version is not None else tree


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a Python function as options; None means not given."""
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in arguments.items() if v is not None}


def _read(config: Path) -> str:
    if not config.exists():
        raise UserError(f"no such file: {config}; --config needs a TOML file")
    return read_text(config, TOML_BYTES)


def _parse(text: str, config: Path) -> dict[str, Any]:
    try:
        return parse_toml(text, config)
    except UserError:
        if config.suffix in (".yaml", ".yml"):
            raise UserError(f"{config} is YAML, as ai-toolkit's configurations are, and --config takes TOML; start "
                            "from examples/stage1.toml and set its keys: lr, targets, rank, steps, [data]") from None
        raise


def _parse_set(item: str) -> tuple[str, Any]:
    key, equals, raw = item.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {item}: expected section.key=value, such as --set optimizer.lr=1e-4")
    key = key.strip().replace("-", "_")
    try:
        return key, parse_toml(f"value = {raw}", f"--set {key}")["value"]
    except UserError:
        return key, raw.strip()


def _from_environment(model: type[Settings], environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Variable and value by dotted key.

    Raises:
        UserError: a key is given under two names.
    """
    keys = _leaf_keys(model)
    older_names = {older: key for key in keys if (older := older_key(key)) is not None}
    known = {_variable(name): key for name, key in (older_names | {key: key for key in keys}).items()}
    given: dict[str, tuple[str, str]] = {}
    for name, value in environment.items():
        if (key := known.get(name)) is None:
            continue
        if key in given:
            older = given[key][0] if name == _variable(key) else name
            raise UserError(f"environment: {older} is the older name of {_variable(key)}, and both are set; leave "
                            f"{older} out")
        given[key] = name, value
    return given


def _variable(key: str) -> str:
    return _PREFIX + key.upper().replace(".", "__")


def _sections(annotation: Any, lists: bool = False) -> list[type[Settings]]:
    """The Settings classes an annotation may hold, through Optional and unions, and on request through lists."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType) or (lists and get_origin(annotation) in (list, tuple)):
        return [m for a in get_args(annotation) for m in _sections(a, lists)]
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        return _sections(get_args(annotation)[0], lists)
    return []


def _leaf_keys(model: type[Settings], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        sections = _sections(info.annotation)
        keys.append(prefix + name)
        for section in sections:
            keys += _leaf_keys(section, f"{prefix}{name}.")
    return keys


def _put(tree: dict[str, Any], key: str, value: Any, source: str, sources: dict[str, str]) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(f"{source}: '{section}' is a value ({child!r}), not a section")
        node = child
    node[leaf] = value
    sources[key] = source
    if (other := other_form(key)) is not None:  # set by a weaker source under its other name
        _drop(tree, other)


def _drop(tree: dict[str, Any], key: str) -> None:
    *sections, leaf = key.split(".")
    node: Any = tree
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node.pop(leaf, None)


def _explained(
    error: ValidationError, model: type[Settings], config: Path | None, text: str, sources: Mapping[str, str]
) -> UserError:
    problems = []
    for key, items, owners in _by_key(error, model):
        source = next((sources[k] for k in (key, *_parents(key)) if k in sources), None)
        if source is None and config is not None and items[0]["type"] != "missing":
            names = (key, other_form(key), older_key(key))
            source = str(config) + next((line for name in names if name and (line := _line_of(text, name))), "")
        elif source is None:
            source = str(config) if config is not None else "settings"
        problems.append(f"{source}: {_message(items, key, owners)}")
    if len(problems) == 1:
        return UserError(problems[0])
    return UserError(f"{len(problems)} problems:", *(f"  {problem}" for problem in problems))


def first_problem(error: ValidationError, model: type[Settings], section: str) -> str:
    """The first of the errors in a section that a validator checks as `model`."""
    key, items, owners = _by_key(error, model)[0]
    return _message(items, ".".join(filter(None, (section, key))), owners)


def _by_key(error: ValidationError, model: type[Settings]) -> list[tuple[str, list[Any], list[type[Settings]]]]:
    """The errors by dotted key: a value that may have several forms has one error for each."""
    errors: dict[str, tuple[list[Any], list[type[Settings]]]] = {}
    for item in error.errors():
        key, owners = _real_key(model, item["loc"], item["type"] == "extra_forbidden")
        items, classes = errors.setdefault(key, ([], []))
        items.append(item)
        classes += [owner for owner in owners if owner not in classes]
    for key, (items, _) in list(errors.items()):  # a table that has errors inside is no wrong form of its key
        inside = any(other.startswith(key + ".") for other in errors)
        if inside and all(isinstance(item.get("input"), dict) and item["type"].endswith("_type") for item in items):
            del errors[key]
    return [(key, items, owners) for key, (items, owners) in errors.items()]


def _message(items: Sequence[Any], key: str, owners: Sequence[type[Settings]]) -> str:
    item, leaf = items[0], key.rpartition(".")[2]
    if item["type"] == "extra_forbidden":
        known = accepted_keys(name for owner in owners for name in owner.model_fields)
        guess = suggestion(leaf, known)
        allowed = "" if guess else f"; known here: {', '.join(sorted(known))}"
        return f"unknown key '{key}'{guess}{allowed}"
    if item["type"] == "missing":
        return f"'{key}' is required"
    reasons = list(dict.fromkeys(reason(each) for each in items))
    # The forms that a value may have are joined; what a validator of ours says stays as it is.
    text = " or ".join([reasons[0], *(each.removeprefix("must be ") for each in reasons[1:])])
    value = item.get("input")
    shown = "" if isinstance(value, dict | Settings) else f" = {value!r}"
    return f"{key}{shown}: {text}" if key else text


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


# A form of a value with several, as pydantic adds it to the location of an error.
_FORM = re.compile(r"(str|int|float|bool|path|none)$|constrained-\w+$|[\w-]+\[.+\]$|(\w*Settings|LoraArgument)$")


def _real_key(
    model: type[Settings], location: tuple[int | str, ...], unknown: bool
) -> tuple[str, list[type[Settings]]]:
    """An error's dotted key without what pydantic adds for members of unions, and the classes that have it.

    Args:
        unknown: the last part is an unknown key.
    """
    owners: list[type[Settings]] = [model]
    key: list[str] = []
    for index, part in enumerate(location):
        fields = [owner.model_fields[part] for owner in owners if isinstance(part, str) and part in owner.model_fields]
        last = index == len(location) - 1
        if fields:
            key.append(str(part))
            nested = [section for info in fields for section in _sections(info.annotation, lists=True)]
            if not last:
                owners = nested or owners
        elif isinstance(part, int):
            key[-1] = f"{key[-1]}[{part}]"
        elif not last and (meant := [o for o in owners if "type" in o.model_fields
                                     and o.model_fields["type"].default == part]):
            owners = meant
        elif (last and (unknown or (part != "[key]" and not _FORM.match(part)))) or location[index + 1 :] == ("[key]",):
            key.append(part)  # of a dict
    return ".".join(key), owners


def _line_of(text: str, key: str) -> str:
    """`, line 12` where `key` is set in the TOML text; empty if a plain scan does not find it."""
    *sections, leaf = re.sub(r"\[\d+\]", "", key).split(".")
    here: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line):
            here = [part.strip().strip('"') for part in header[1].split(".")]
            if here == [*sections, leaf]:
                return f", line {number}"
            continue
        plain = here == sections and re.match(rf'\s*"?{re.escape(leaf)}"?\s*=', line)
        inline = sections and here == sections[:-1] and re.match(rf"\s*{re.escape(sections[-1])}\s*=\s*\{{", line)
        if plain or inline:
            return f", line {number}"
    return ""
