"""Taxonomies of merged families, for mixtures of fewer experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tomli_w

from lapwan.data.taxonomy import Taxonomy


def merge_families(taxonomy: Taxonomy, name: str, families: Mapping[str, Sequence[str]]) -> Taxonomy:
    """A taxonomy whose families are unions of another's; words that clash with nothing are kept as they are."""
    tables = {table["key"]: table for table in taxonomy.to_dict()["families"]}
    default = taxonomy.families[taxonomy.default].key
    merged = []
    for key, parts in families.items():
        words = {role: list(dict.fromkeys(word for part in parts for word in tables[part][role]))
                 for role in ("keywords", "actions", "aliases", "names_zh")}
        words["actions"] = [word for word in words["actions"] if word not in words["keywords"]]
        merged.append({"key": key, "names": [key.capitalize()], **words})
    into = next(key for key, parts in families.items() if default in parts)
    return Taxonomy.from_dict({"name": name, "default": into, "ignore": list(taxonomy.ignore), "families": merged})


def taxonomy_toml(taxonomy: Taxonomy) -> str:
    """A taxonomy as its file."""
    text: str = tomli_w.dumps(taxonomy.to_dict())
    return text
