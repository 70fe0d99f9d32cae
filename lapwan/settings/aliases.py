"""Other names of settings keys: short forms, names of older versions, and the names that other trainers use.

How to add a short form: a row in `SHORT`.
How to rename a key: its old name in `RENAMED`; for an option on the command line also a row in `lapwan.cli_aliases`.
How to change a default: the old one in `OLD_DEFAULTS`, and `SETTINGS_VERSION` counted up.
How to add another trainer's name: a row in `OTHER_TRAINERS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lapwan.errors import nearest

# Full key -> short one, at the top of a file and in [high] and [low] alike.
SHORT: Mapping[str, str] = {"optimizer.lr": "lr", "targets.rank": "rank"}

# Older name of a key -> today's, at the top of a file and in [high] and [low] alike. Old names are accepted for ever.
RENAMED: Mapping[str, str] = {
    "optimiser": "optimizer", "optimiser_on_cpu": "optimizer_on_cpu", "experts": "noise_experts",
    "reuse": "first_block_cache",
}

# Written into the settings of a run, behind this first line. With the line but without a version they are of version 1.
RUN_HEADER = "# The resolved settings of this run; `--config` with this file repeats it."
SETTINGS_VERSION = 2
VERSION_KEY = "settings_version"
# Version -> dotted key -> its default in run settings of that version and older ones. When such a file lacks the key it
# is set to this value, so that a changed default does not change a run that is resumed or repeated.
OLD_DEFAULTS: Mapping[int, Mapping[str, Any]] = {}

# Name in musubi-tuner, ai-toolkit, diffusion-pipe or diffusers' scripts -> name here. Only used in error messages.
OTHER_TRAINERS: Mapping[str, str] = {
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
    "gradient_accumulation": "accumulate", "training_folder": "output", "switch_boundary_every": "turn",
    "timestep_type": "sigma", "noise_scheduler": "sigma", "quantize": "dtype", "qtype": "dtype", "low_vram": "memory",
    "max_step_saves_to_keep": "keep_last", "sample_every": "preview", "sample": "preview",
    "caption_dropout_rate": "caption_dropout", "name_or_path": "model", "datasets": "data", "folder_path": "data",
    "network": "targets", "optimizer_params": "optimizer", "adapter": "targets", "dataset": "data",
    "transformer_dtype": "dtype", "transformer_path": "model", "ckpt_path": "model", "max_steps": "steps",
    "init_from_existing": "init_lora", "eval_every_n_steps": "validation", "eval_every_n_epochs": "validation",
    "eval_datasets": "validation", "force_constant_lr": "lr", "save_every_n_epochs": "save_every",
    "checkpoint_every_n_minutes": "save_every", "resume_from_checkpoint": "resume", "lora_alpha": "alpha",
    "pretrained_model_name_or_path": "model", "checkpointing_steps": "save_every",
    "checkpoints_total_limit": "keep_last", "validation_prompts": "preview",
}


def current_key(key: str) -> str:
    """Today's name of a dotted key: `high.optimiser.lr` -> `high.optimizer.lr`."""
    first, dot, rest = key.partition(".")
    if first in ("high", "low"):
        return first + dot + current_key(rest)
    return RENAMED.get(first, first) + dot + rest


def older_key(key: str) -> str | None:
    """The inverse of `current_key`, of a list's item the list's; None if the key never had another name."""
    first, dot, rest = re.sub(r"\[\d+\]", "", key).partition(".")
    if first in ("high", "low"):
        older = older_key(rest)
        return None if older is None else first + dot + older
    return next((old + dot + rest for old, new in RENAMED.items() if new == first), None)


def current_keys(
    tree: Mapping[str, Any], renamed: Mapping[str, str] = RENAMED, sections: tuple[str, ...] = ("high", "low")
) -> dict[str, Any]:
    """The tree with older keys renamed to today's, also in `sections`.

    Raises:
        ValueError: a key is given under both names.
    """
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = renamed.get(key, key)
        if name != key and name in tree:
            raise ValueError(f"{key} is the older name of {name}, and both are given; leave {key} out")
        if key in sections and isinstance(value, Mapping):
            try:
                value = current_keys(value, renamed, ())
            except ValueError as error:
                raise ValueError(f"[{key}] {error}") from None
        out[name] = value
    return out


def with_old_defaults(
    tree: Mapping[str, Any], version: int, table: Mapping[int, Mapping[str, Any]] = OLD_DEFAULTS
) -> dict[str, Any]:
    """Run settings of an older version, with missing keys set to the defaults of that version."""
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


def expand_short_forms(tree: Mapping[str, Any], sections: tuple[str, ...] = ("high", "low")) -> dict[str, Any]:
    """The tree with each short form moved into its section: `lr = 1e-4` becomes `optimizer = {lr = 1e-4}`.

    Raises:
        ValueError: a short form and its full key are both given.
    """
    out = dict(tree)
    for full, short in SHORT.items():
        section, leaf = full.split(".")
        if short not in out:
            continue
        value, given = out.pop(short), out.get(section, {})
        if isinstance(given, str):  # targets = "last_8"
            given = {"recipe": given}
        if not isinstance(given, Mapping):
            continue  # validation reports what is wrong with it
        if leaf in given:
            raise ValueError(f"{short} = {value!r} and {full} = {given[leaf]!r} say the same thing; leave one out")
        out[section] = {**given, leaf: value}
    for name in sections:
        if isinstance(out.get(name), Mapping):
            try:
                out[name] = expand_short_forms(out[name], ())
            except ValueError as error:
                raise ValueError(f"[{name}] {error}") from None
    return out


def other_form(key: str) -> str | None:
    """The other form of a dotted key: `lr` for `optimizer.lr` and vice versa, also inside [high] and [low]."""
    for section in ("high.", "low."):
        if key.startswith(section):
            other = other_form(key.removeprefix(section))
            return None if other is None else section + other
    return SHORT.get(key) or next((full for full, short in SHORT.items() if short == key), None)


def accepted_keys(fields: Iterable[str]) -> list[str]:
    """The keys that a section with these fields accepts, short forms included."""
    known = list(dict.fromkeys(fields))
    return known + [short for full, short in SHORT.items() if full.split(".")[0] in known and short not in known]


def suggestion(word: str, known: Iterable[str]) -> str:
    """A hint at what an unknown key may have meant, to append to a message; empty if no known key is close."""
    keys = list(known)
    here = OTHER_TRAINERS.get(word)
    return f" (here it is '{here}')" if here in keys else nearest(word, keys)
