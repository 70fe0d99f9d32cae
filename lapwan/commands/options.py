"""Command-line options made from a settings model, and the function that loads the settings and runs the command.

Imports the settings and so pydantic: `lapwan.cli` imports this module only when a command is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.main import get_command

from lapwan.commands.table import Command
from lapwan.settings.base import FlagField, RunOptions, flag_fields

NO_VALUE = ""  # metavar of a flag: for None, Typer would write <bool> behind it


def _common(name: str, kind: Any, default: Any, *flags: str, help: str, metavar: str = NO_VALUE) -> inspect.Parameter:
    option = typer.Option(*flags, metavar=metavar, help=help, rich_help_panel="Every command")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


_COMMON = (
    _common("config", Path | None, None, "--config", metavar="FILE", help="Settings as TOML."),
    _common("sets", list[str], [], "--set", metavar="KEY=VALUE",
            help="Set one key, as section.key=value; repeatable."),
    _common("dry_run", bool, False, "--dry-run", help="Check everything, print the resolved settings and the plan, "
                                                      "then stop."),
    _common("overwrite", bool, False, "--overwrite", help="Replace an existing output."),
    _common("verbose", bool, False, "-v", "--verbose", help="Print more details on stderr."),
    _common("quiet", bool, False, "-q", "--quiet", help="Print only warnings and errors on stderr."),
)
_NO_LOCK = inspect.Parameter("no_lock", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[
    bool, typer.Option("--no-lock", metavar=NO_VALUE, show_default=False,
                       help="Do not lock the output folder, for file systems without locks. Two commands that write "
                            "there at the same time then damage each other's files.")])


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) in (list, tuple) and (len(get_args(annotation)) == 1 or ... in get_args(annotation))


def _holds(annotation: Any, kind: type) -> bool:
    return annotation is kind or kind in get_args(annotation)


def _help(field: FlagField) -> str:
    default = field.info.default
    text = field.info.description or ""
    shown = isinstance(default, bool | int | float | str) and default != "" and not field.info.is_required()
    if shown and not isinstance(default, bool):
        text = f"{text} \\[default: {default}]"
    return text


def _parameter(name: str, field: FlagField) -> inspect.Parameter:
    """The Typer parameter of a settings field. Values stay strings: the settings parse them, as they do a file's."""
    annotation, flag = field.info.annotation, field.flag
    many = _is_list(annotation)
    metavar = flag.metavar or field.key.rsplit(".", 1)[-1].upper()
    if flag.positional:
        kind: Any = list[str] if many else str | None
        info: Any = typer.Argument(metavar=metavar, help=_help(field), show_default=False)
    else:
        long = field.long_name
        short = [n for n in flag.names if not n.startswith("--")]
        if _holds(annotation, bool):
            # A flag that is off by default has no --no- form; --set KEY=false overrides a file's `true`.
            if "/" not in long and field.info.default is not False:
                long = f"{long}/--no-{long[2:]}"
            info = typer.Option(long, *short, metavar=NO_VALUE, help=_help(field), show_default=False)
            kind = bool | None
        else:
            info = typer.Option(long, *short, metavar=metavar, help=_help(field), show_default=False)
            kind = list[str] if many else str | None
    default: Any = [] if kind == list[str] else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


@dataclass(frozen=True)
class OptionWords:
    """An option as it is typed: its long name, whether a value follows, and whether it may be repeated."""

    name: str
    value: bool
    repeatable: bool


def function_of(command: Command) -> Callable[..., None]:
    """The function of a command for Typer: its keyword arguments are the options, and it runs the command."""
    settings_model = command.settings_model()
    fields = {field.key.replace(".", "__"): field for field in flag_fields(settings_model)}

    def call(**values: Any) -> None:
        from lapwan import console  # --help needs neither of these
        from lapwan.settings.load import load

        common = {p.name: values.pop(p.name) for p in _COMMON}
        lock = not values.pop(_NO_LOCK.name, False)
        console.set_level(
            console.VERBOSE if common["verbose"] else console.QUIET if common["quiet"] else console.NORMAL
        )
        options = {fields[name].key: value for name, value in values.items() if value is not None and value != []}
        settings = load(settings_model, common["config"], common["sets"], options)
        command.run(settings, RunOptions(common["dry_run"], common["overwrite"], lock))

    parameters = [_parameter(name, field) for name, field in fields.items()]
    if command.locks:
        parameters.append(_NO_LOCK)
    call.__signature__ = inspect.Signature([*parameters, *_COMMON])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*parameters, *_COMMON)}
    call.__doc__ = command.help
    return call


def click_command(command: Command) -> Any:
    """The command as Typer makes it of its function, with the options in `params`."""
    single = typer.Typer(add_completion=False)
    single.command()(function_of(command))
    return get_command(single)


def option_words(command: Command) -> dict[str, OptionWords]:
    """Every name of a command's options, short ones and `--no-` forms included."""
    names: dict[str, OptionWords] = {}
    for param in click_command(command).params:
        if param.param_type_name == "option":
            long = next((name for name in param.opts if name.startswith("--")), param.opts[0])
            option = OptionWords(long, not param.is_flag, param.multiple)
            names |= dict.fromkeys((*param.opts, *param.secondary_opts), option)
    return names
