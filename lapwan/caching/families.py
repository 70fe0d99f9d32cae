"""Labels of a cache under a taxonomy: an index names the families, training numbers them in its taxonomy's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lapwan.caching.index import CachedItem, CacheIndex
from lapwan.data.taxonomy import Taxonomy, load_taxonomy
from lapwan.errors import UserError


def with_families(index: CacheIndex, labels: Sequence[Mapping[str, Any]]) -> CacheIndex:
    """`index` with the families of its taxonomy and the fingerprint, if it is known and the labels are in its order.

    Args:
        labels: CachedItem's label fields of all clips.
    """
    if index.taxonomy is None:
        return index
    try:
        taxonomy = load_taxonomy(index.taxonomy)
    except UserError:  # a file that lies elsewhere: labels stay numbers
        return index
    count = len(taxonomy.families)
    for fields in labels:
        label, weights, name = fields.get("label"), fields.get("label_weights"), fields.get("label_name")
        fits = (weights is None or len(weights) == count) and (label is None or label < count)
        if not fits or (label is not None and name not in (None, taxonomy.families[label].name)):
            return index
    return replace(index, families=taxonomy.keys, taxonomy_fingerprint=taxonomy.fingerprint)


def labels_in_order(index: CacheIndex, items: Sequence[CachedItem], taxonomy: Taxonomy) -> list[CachedItem]:
    """`items` of an index with their labels numbered in the taxonomy's order.

    Args:
        index: names the families that the labels of `items` were numbered by.
        taxonomy: of the training.

    Raises:
        UserError: the families are others than the taxonomy's, or an older index without families has a label whose
            name is that of another family.
    """
    advice = f"label the clips with taxonomy {taxonomy.name} and cache again"
    if index.families is None:
        names = [family.name for family in taxonomy.families]
        for item in items:
            if item.label is not None and item.label_name in names and names.index(item.label_name) != item.label:
                raise UserError(f"{index.folder}: clip {item.id} has label {item.label}, '{item.label_name}', which is "
                                f"family {names.index(item.label_name)} of taxonomy {taxonomy.name}: its order has "
                                f"changed; {advice}")
        return list(items)
    if index.families == taxonomy.keys:
        return list(items)
    if set(index.families) != set(taxonomy.keys):
        raise UserError(f"{index.folder} has labels of the families {', '.join(index.families)}, but taxonomy "
                        f"{taxonomy.name} has {', '.join(taxonomy.keys)}; {advice}")
    old = [index.families.index(key) for key in taxonomy.keys]  # by new number
    return [replace(
        item, label=None if item.label is None else old.index(item.label),
        label_weights=None if item.label_weights is None else tuple(item.label_weights[number] for number in old),
    ) for item in items]
