"""Older names of options, replaced by today's before Typer sees them. They stay accepted, but no help shows them.

How to rename an option: its old name in `_ALIASES`. Settings keys have their own table, `lapwan.settings.aliases`;
other programs' options are in `lapwan.commands.foreign_options`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lapwan.commands.foreign_options import has_foreign
from lapwan.errors import UserError, printable

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


class _Answer(UserError):
    """Holds a command to copy, in which no value is cut."""

    def __str__(self) -> str:
        return "\n".join(map(printable, self.args))


def rewrite(arguments: Sequence[str]) -> list[str]:
    """The arguments under today's option names: dashes for underscores, `--size HxW` for `--video-size H W`.

    Raises:
        UserError: options of other programs; the message has the whole line under lapwan's names.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    command, rest = arguments[0], list(arguments[1:])
    aliases = _ALIASES.get(command, {})
    if has_foreign(command, rest):
        from lapwan.commands.foreign_line import answer  # imports pydantic, which --help does without

        raise _Answer(*answer(command, rest, aliases))
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
        if name == "--video-size" and not equals and len(rest) >= 2 and rest[0].isdigit() and rest[1].isdigit():
            out += [aliases[name], f"{rest.pop(0)}x{rest.pop(0)}"]
            continue
        out.append(aliases.get(name, name) + equals + value)
    return out
