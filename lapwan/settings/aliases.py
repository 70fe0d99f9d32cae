"""Keys that users write without their section, and the names that other trainers have for ours.

How to add a short form: a row in `SHORT`. How to add another trainer's name: a row in `ELSEWHERE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lapwan.errors import nearest

# Full key -> short one, at the top of a file and in [high] and [low] alike.
SHORT: Mapping[str, str] = {"optimiser.lr": "lr", "targets.rank": "rank"}

# In musubi-tuner, ai-toolkit, diffusion-pipe or diffusers' scripts -> here; only named in an error, never taken.
ELSEWHERE: Mapping[str, str] = {
    "learning_rate": "lr", "network_dim": "rank", "network_alpha": "alpha", "lora_rank": "rank", "linear": "rank",
    "linear_alpha": "alpha", "optimizer": "optimiser", "optimizer_type": "optimiser", "lr_scheduler": "schedule",
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


def spell_out(tree: Mapping[str, Any], sections: tuple[str, ...] = ("high", "low")) -> dict[str, Any]:
    """The tree with each short form in its section, such as `lr = 1e-4` as `optimiser = {lr = 1e-4}`.

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
    """The other spelling of a dotted key: `lr` of `optimiser.lr` and the reverse, also inside [high] and [low]."""
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
