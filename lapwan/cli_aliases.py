"""Older names of options, replaced by today's before Typer sees them. They are accepted for ever, but not in any help.

How to rename an option: its old name in `_ALIASES`. Settings keys have their own table, `lapwan.settings.aliases`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lapwan.errors import UserError

# Command -> older option -> today's.
_ALIASES: dict[str, dict[str, str]] = {
    "generate": {
        "--lora-moe-weights": "--moe",
        "--output-path": "--output",
        "--image-path": "--image",
        "--num-steps": "--steps",
        "--guidance-scale": "--guidance",
        "--video-size": "--size",
        "--reuse": "--first-block-cache",
    },
    "srpo": {"--experts": "--noise-experts", "--optimiser-on-cpu": "--optimizer-on-cpu"},
}

_FILES = (
    "give the model folder with --model FOLDER, or the files in a TOML file for --config: "
    "[model] high, low, vae, text_encoder, tokenizer"
)

# Command -> option of an older script that lapwan does not have -> what to do instead.
_REPLACED: dict[str, dict[str, str]] = {
    "generate": {
        "--task": "the task is read from the model; leave it out",
        "--clip": "Wan2.2 has no image encoder; leave it out",
        "--dit": _FILES,
        "--dit-high-noise": _FILES,
        "--vae": _FILES,
        "--t5": _FILES,
    },
}


def rewrite(arguments: Sequence[str]) -> list[str]:
    """The arguments under today's option names: dashes for underscores, `--size HxW` for `--video-size H W`.

    Raises:
        UserError: an option that lapwan does not have; the message says what to do instead.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    command, rest = arguments[0], list(arguments[1:])
    aliases, replaced = _ALIASES.get(command, {}), _REPLACED.get(command, {})
    out = [command]
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*out, word, *rest]
        if not word.startswith("--"):
            out.append(word)
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-")
        if name in replaced:
            raise UserError(f"{name}: {replaced[name]}")
        if name == "--video-size" and not equals and len(rest) >= 2 and rest[0].isdigit() and rest[1].isdigit():
            out += [aliases[name], f"{rest.pop(0)}x{rest.pop(0)}"]
            continue
        out.append(aliases.get(name, name) + equals + value)
    return out
