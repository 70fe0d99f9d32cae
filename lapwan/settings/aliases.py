"""Other names of settings: short forms, names of older versions, and names that other trainers have for ours.

How to add a short form: a row in `SHORT`. How to rename a key: its old name in `RENAMED`. How to change a default: the
old one in `OLD_DEFAULTS`, and `SETTINGS_VERSION` counted up. How to add another trainer's name: a row in `ELSEWHERE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lapwan.errors import nearest

# Full key -> short one, at the top of a file and in [high] and [low] alike.
SHORT: Mapping[str, str] = {"optimizer.lr": "lr", "targets.rank": "rank"}

# Older name of a key -> today's, at the top of a file and in [high] and [low] alike. Read for ever.
RENAMED: Mapping[str, str] = {
    "optimiser": "optimizer", "optimiser_on_cpu": "optimizer_on_cpu", "experts": "noise_experts",
    "reuse": "first_block_cache",
}

# Written into the settings of a run. A file without it is of version 1.
SETTINGS_VERSION = 2
VERSION_KEY = "settings_version"
# Version -> dotted key -> what its absence meant in run settings of that version and older ones. Such a key is set
# when they are read again, so that a changed default does not change a run that is resumed or repeated.
OLD_DEFAULTS: Mapping[int, Mapping[str, Any]] = {}

# In musubi-tuner, ai-toolkit, diffusion-pipe or diffusers' scripts -> here; only named in an error, never taken.
ELSEWHERE: Mapping[str, str] = {
    "learning_rate": "lr", "network_dim": "rank", "network_alpha": "alpha", "lora_rank": "rank", "linear": "rank",
    "linear_alpha": "alpha", "optimizer_type": "optimizer", "lr_scheduler": "schedule",
    "lr_warmup_steps": "schedule", "warmup_steps": "schedule", "max_train_steps": "steps", "max_train_epochs": "epochs",
    "num_train_epochs": "epochs", "train_batch_size": "batch_size", "micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulate", "gradient_checkpointing": "activation_checkpointing",
    "gradient_clipping": "max_grad_norm", "mixed_precision": "dtype", "fp8_base": "dtype", "blocks_to_swap": "memory",
    "timestep_sampling": "sigma", "timestep_sample_method": "sigma", "discrete_flow_shift": "sigma", "shift": "sigma",
    "weighting_scheme": "weighting", "min_timestep": "sigma", "max_timestep": "sigma", "network_weights": "init_lora",
    "network_dropout": "dropout", "scale_weight_norms": "max_norm", "output_dir": "output", "output_name": "name",
    "save_every_n_steps": "save_every", "sample_prompts": "preview", "sample_every_n_steps": "preview",
    "dataset_config": "data",
}


def current_key(key: str) -> str:
    """A dotted key under today's name: `high.optimiser.lr` as `high.optimizer.lr`."""
    first, dot, rest = key.partition(".")
    if first in ("high", "low"):
        return first + dot + current_key(rest)
    return RENAMED.get(first, first) + dot + rest


def older_key(key: str) -> str | None:
    """The inverse of `current_key`; None where the key never had another name."""
    first, dot, rest = key.partition(".")
    if first in ("high", "low"):
        older = older_key(rest)
        return None if older is None else first + dot + older
    return next((old + dot + rest for old, new in RENAMED.items() if new == first), None)


def current_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with older keys under today's names.

    Raises:
        ValueError: a key under both names.
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = RENAMED.get(key, key)
        if name != key and name in tree:
            raise ValueError(f"{key} is the older name of {name}, and both are given; leave {key} out")
        out[name] = current_keys(value) if key in ("high", "low") and isinstance(value, Mapping) else value
    return out


def with_old_defaults(
    tree: Mapping[str, Any], version: int, table: Mapping[int, Mapping[str, Any]] = OLD_DEFAULTS
) -> dict[str, Any]:
    """Run settings of an older version, with each key that they lack at what its absence meant then."""
    out = dict(tree)
    for since in sorted(v for v in table if v >= version):
        for key, value in table[since].items():
            *sections, leaf = key.split(".")
            node = out
            for section in sections:
                node[section] = dict(node.get(section) or {})
                node = node[section]
            node.setdefault(leaf, value)
    return out


def spell_out(tree: Mapping[str, Any], sections: tuple[str, ...] = ("high", "low")) -> dict[str, Any]:
    """The tree with each short form in its section, such as `lr = 1e-4` as `optimizer = {lr = 1e-4}`.

    Raises:
        ValueError: a short form and its full key both there.
    """
    out = dict(tree)
    for full, short in SHORT.items():
        section, leaf = full.split(".")
        if short not in out:
            continue
        value, held = out.pop(short), out.get(section, {})
        if isinstance(held, str):  # targets = "last_8"
            held = {"recipe": held}
        if not isinstance(held, Mapping):
            continue  # validation says what is wrong with it
        if leaf in held:
            raise ValueError(f"{short} = {value!r} and {full} = {held[leaf]!r} say the same thing; leave one out")
        out[section] = {**held, leaf: value}
    for name in sections:
        if isinstance(out.get(name), Mapping):
            try:
                out[name] = spell_out(out[name], ())
            except ValueError as error:
                raise ValueError(f"[{name}] {error}") from None
    return out


def partner(key: str) -> str | None:
    """The other form of a dotted key: `lr` of `optimizer.lr` and the reverse, also inside [high] and [low]."""
    for section in ("high.", "low."):
        if key.startswith(section):
            other = partner(key.removeprefix(section))
            return None if other is None else section + other
    return SHORT.get(key) or next((full for full, short in SHORT.items() if short == key), None)


def takes(fields: Iterable[str]) -> list[str]:
    """The keys of a section with these fields, short forms among them."""
    known = list(dict.fromkeys(fields))
    return known + [short for full, short in SHORT.items() if full.split(".")[0] in known and short not in known]


def suggestion(word: str, known: Iterable[str]) -> str:
    """What an unknown key may have meant, to append to a message; empty where nothing is near."""
    keys = list(known)
    own = ELSEWHERE.get(word)
    return f" (here it is '{own}')" if own in keys else nearest(word, keys)
