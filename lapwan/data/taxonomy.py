"""Taxonomies: the instrument families of a mixture, in order, and the words that name them.

How to add a taxonomy: a TOML file like those in `taxonomies/`, given as `--taxonomy my.toml`; one that should come with
the package goes into that folder. Families keep the order of the file: it is the order of experts and of label columns.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lapwan.data.caption_text import units
from lapwan.errors import UserError, nearest

_SHIPPED = Path(__file__).parent / "taxonomies"
_KEY = re.compile(r"[a-z][a-z0-9_]*")
PARTS = ("verbs", "nouns", "materials")


@dataclass(frozen=True)
class Family:
    """An instrument family, which one expert learns.

    `keywords` count as evidence; `actions` only in a caption where no keyword counted; `aliases` and names are
    understood as hints but are not evidence in a caption (`other` is a word of everyday prose). `verbs`, `nouns` and
    `materials` repeat keywords or actions: a verb or noun counts only where the caption uses it as one (`saw`; in both
    lists: either), a verb only where no other instrument does it, a material (clip, suture) only where no other
    instrument works on it.
    """

    key: str
    names: tuple[str, ...]
    names_zh: tuple[str, ...] = ()
    description: str = ""
    keywords: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    materials: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The English display name, `instrument_name` in label files."""
        return self.names[0]

    @property
    def hints(self) -> tuple[str, ...]:
        """Every name that means exactly this family."""
        return (self.key, *self.names, *self.names_zh, *self.aliases)


@dataclass(frozen=True)
class Taxonomy:
    """Families in order; `default` is the family's index for captions without any evidence.

    `ignore` are phrases that contain a keyword's characters and mean something else (钩突, 呼吸); `no_family` are
    instruments of no family: no evidence, and what they do is none either (超声刀离断).
    """

    name: str
    families: tuple[Family, ...]
    default: int
    description: str = ""
    ignore: tuple[str, ...] = ()
    no_family: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The families' keys in order."""
        return tuple(family.key for family in self.families)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over everything but the descriptions."""
        relevant = self.to_dict()
        relevant.pop("description", None)
        for family in relevant["families"]:
            family.pop("description", None)
        text = json.dumps(relevant, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The taxonomy as in its TOML file: what a mixture file embeds, and `from_dict` reads."""
        return {
            "name": self.name,
            "description": self.description,
            "default": self.families[self.default].key,
            "ignore": list(self.ignore),
            # Absent while empty: a taxonomy without them keeps its fingerprint
            **({"no_family": list(self.no_family)} if self.no_family else {}),
            "families": [
                {f.name: list(v) if isinstance(v := getattr(family, f.name), tuple) else v for f in fields(Family)
                 if f.name not in PARTS or getattr(family, f.name)}
                for family in self.families
            ],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "taxonomy") -> Taxonomy:
        """The inverse of `to_dict`, with every check of a file.

        Raises:
            UserError: unknown key, wrong type, empty family, a phrase in two families, an unknown default.
        """
        return _Reader(source).taxonomy(data)


def shipped() -> list[str]:
    """Names of the taxonomies that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.toml"))


def load_taxonomy(name_or_path: str) -> Taxonomy:
    """A shipped taxonomy by name, or one from a TOML file.

    Raises:
        UserError: no such taxonomy or file, or the file breaks a rule (see `Taxonomy.from_dict`).
    """
    if name_or_path in shipped():
        path = _SHIPPED / f"{name_or_path}.toml"
    else:
        path = Path(name_or_path)
        if path.suffix != ".toml" and not path.is_file():
            raise UserError(f"unknown taxonomy '{name_or_path}'{nearest(name_or_path, shipped())}; "
                            f"known: {', '.join(shipped())}, or the path of a .toml file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such taxonomy file: {path}; known by name: {', '.join(shipped())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read taxonomy {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"taxonomy {path} is not valid TOML: {error}") from None
    return Taxonomy.from_dict({"name": path.stem, **data}, str(path))


class _Reader:
    """Checks a taxonomy's tables and reports every problem at once."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._problems: list[str] = []

    def taxonomy(self, data: Mapping[str, Any]) -> Taxonomy:
        self._check_keys(data, ("name", "description", "default", "ignore", "no_family", "families"), "")
        tables = data.get("families")
        if not isinstance(tables, list) or not tables or not all(isinstance(t, Mapping) for t in tables):
            self._problems.append("'families' must be one or more tables, each written as [[families]]")
            tables = []
        families = tuple(self._family(table, f"families[{i}]") for i, table in enumerate(tables))
        keys = [family.key for family in families]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            self._problems.append(f"two families have the key '{key}'; keys must differ")
        default = self._text(data, "default", "", required=True)
        if default and families and default not in keys:
            self._problems.append(f"default = '{default}' is not a family{nearest(default, keys)}; "
                                  f"one of: {', '.join(keys)}")
        ignore, no_family = self._words(data, "ignore", ""), self._words(data, "no_family", "")
        name, description = self._text(data, "name", "", required=True), self._text(data, "description", "")
        for family in families:
            if not family.keywords and family.key != default:
                self._problems.append(f"family '{family.key}' is empty: give it at least one keyword "
                                      "(only the default family may have none)")
        self._check_clashes(families, ignore, no_family)
        if self._problems:
            raise UserError(self._message())
        return Taxonomy(name, families, keys.index(default), description, ignore, no_family)

    def _family(self, table: Mapping[str, Any], path: str) -> Family:
        self._check_keys(table, tuple(f.name for f in fields(Family)), path)
        key = self._text(table, "key", path, required=True)
        if key and not _KEY.fullmatch(key):
            self._problems.append(f"{path}.key = '{key}': lower-case ASCII letters, digits and _ only, such as 'hook'")
        names = self._words(table, "names", path)
        family = Family(
            key, names or (key.replace("_", " ").capitalize(),), self._words(table, "names_zh", path),
            self._text(table, "description", path), self._words(table, "keywords", path),
            self._words(table, "actions", path), self._words(table, "aliases", path),
            *(self._words(table, part, path) for part in PARTS),
        )
        evidence = {units(word) for word in (*family.keywords, *family.actions)}
        listed: dict[tuple[str, ...], str] = {}
        for part in PARTS:
            for word in getattr(family, part):
                if units(word) not in evidence:
                    self._problems.append(f"{path}.{part}: '{word}' is no keyword or action of '{key}'; add it there")
                if {listed.setdefault(units(word), part), part} & {"materials"} != {part} & {"materials"}:
                    self._problems.append(f"{path}: '{word}' is in materials and in verbs or nouns; keep it in one")
        return family

    def _check_keys(self, table: Mapping[str, Any], known: tuple[str, ...], path: str) -> None:
        for key in table:
            if key not in known:
                prefix = f"{path}: " if path else ""
                self._problems.append(
                    f"{prefix}unknown key '{key}'{nearest(key, known) or '; known here: ' + ', '.join(known)}"
                )

    def _text(self, table: Mapping[str, Any], key: str, path: str, required: bool = False) -> str:
        dotted, value = f"{path}.{key}".lstrip("."), table.get(key, "")
        if not isinstance(value, str):
            self._problems.append(f"{dotted} = {value!r}: must be a string")
            return ""
        if required and not value.strip():
            self._problems.append(f"'{dotted}' is required")
        return value.strip()

    def _words(self, table: Mapping[str, Any], key: str, path: str) -> tuple[str, ...]:
        dotted, value = f"{path}.{key}".lstrip("."), table.get(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
            self._problems.append(f"{dotted} = {value!r}: must be a list of strings")
            return ()
        for word in value:
            if not units(word):
                self._problems.append(f"{dotted}: empty phrase {word!r}; remove it")
        return tuple(value)

    def _check_clashes(
        self, families: tuple[Family, ...], ignore: tuple[str, ...], no_family: tuple[str, ...]
    ) -> None:
        """A phrase may belong to one family only, whatever inflection or script it is written in."""
        owner: dict[tuple[str, ...], tuple[str, str, str]] = {}
        for key, role, phrase in _phrases(families, ignore, no_family):
            first = owner.setdefault(units(phrase), (key, role, phrase))
            if first[0] != key:
                same = f"'{phrase}'" if first[2] == phrase else f"'{first[2]}' = '{phrase}'"
                self._problems.append(f"{same} is in {_describe(first)} and in {_describe((key, role, phrase))}; "
                                      "keep it in one")
            elif {first[1], role} == {"keywords", "actions"}:
                self._problems.append(f"'{phrase}' is a keyword and an action of '{key}'; keep it in one")

    def _message(self) -> str:
        if len(self._problems) == 1:
            return f"{self._source}: {self._problems[0]}"
        return f"{self._source}: {len(self._problems)} problems:\n" + "\n".join(f"  {p}" for p in self._problems)


def _phrases(
    families: tuple[Family, ...], ignore: tuple[str, ...], no_family: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    for family in families:
        for role in ("keywords", "actions", "names", "names_zh", "aliases"):
            for phrase in getattr(family, role):
                yield family.key, role, phrase
        yield family.key, "key", family.key
    for phrase in ignore:
        yield "", "ignore", phrase
    for phrase in no_family:
        yield "no_family", "no_family", phrase


def _describe(owner: tuple[str, str, str]) -> str:
    return f"'{owner[1]}'" if owner[1] in ("ignore", "no_family") else f"{owner[1]} of '{owner[0]}'"
