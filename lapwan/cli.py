"""The Typer app: names, help and flags, made from the settings models. Imports no torch, so --help is instant.

How to add a command: a settings model in `lapwan/settings/`, `run(settings, options)` in `lapwan/commands/`, and one
row in `COMMANDS`.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer

from lapwan import __version__, console
from lapwan.cli_aliases import rewrite
from lapwan.commands.table import COMMANDS, Command
from lapwan.errors import Interrupted, UserError
from lapwan.settings.base import FlagField, RunOptions, Settings, flag_fields
from lapwan.settings.load import load

app = typer.Typer(
    name="lapwan",
    help="Fine-tune, specialise, align and diagnose Wan2.2 video models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_NO_VALUE = ""  # as a metavar: a flag takes none, and Typer would write <bool> behind it


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar=_NO_VALUE, help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    """Fine-tune, specialise, align and diagnose Wan2.2 video models."""
    if version:
        console.results.print(f"lapwan {__version__}")
        raise typer.Exit


def _common(name: str, kind: Any, default: Any, *flags: str, help: str, metavar: str = _NO_VALUE) -> inspect.Parameter:
    option = typer.Option(*flags, metavar=metavar, help=help, rich_help_panel="Every command")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


_COMMON = (
    _common("config", Path | None, None, "--config", metavar="FILE", help="Settings as TOML."),
    _common("sets", list[str], [], "--set", metavar="KEY=VALUE",
            help="One setting, as section.key=value; repeatable."),
    _common("dry_run", bool, False, "--dry-run", help="Check everything, print the resolved settings and the plan, "
                                                      "stop."),
    _common("overwrite", bool, False, "--overwrite", help="Replace an output that exists."),
    _common("verbose", bool, False, "-v", "--verbose", help="Say more on stderr."),
    _common("quiet", bool, False, "-q", "--quiet", help="Only warnings and errors on stderr."),
)


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
    """The Typer parameter of a settings field: strings through, so that the settings parse them in one place."""
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
            # What is off by default needs no second name; a file's `true` is taken back by --set.
            if "/" not in long and field.info.default is not False:
                long = f"{long}/--no-{long[2:]}"
            info = typer.Option(long, *short, metavar=_NO_VALUE, help=_help(field), show_default=False)
            kind = bool | None
        else:
            info = typer.Option(long, *short, metavar=metavar, help=_help(field), show_default=False)
            kind = list[str] if many else str | None
    default: Any = [] if kind == list[str] else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _make(command: Command, settings_model: type[Settings]) -> Callable[..., None]:
    fields = {field.key.replace(".", "__"): field for field in flag_fields(settings_model)}

    def call(**values: Any) -> None:
        common = {p.name: values.pop(p.name) for p in _COMMON}
        console.set_level(
            console.VERBOSE if common["verbose"] else console.QUIET if common["quiet"] else console.NORMAL
        )
        options = {fields[name].key: value for name, value in values.items() if value is not None and value != []}
        settings = load(settings_model, common["config"], common["sets"], options)
        command.run(settings, RunOptions(dry_run=common["dry_run"], overwrite=common["overwrite"]))

    parameters = [_parameter(name, field) for name, field in fields.items()]
    call.__signature__ = inspect.Signature([*parameters, *_COMMON])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*parameters, *_COMMON)}
    call.__doc__ = command.help
    return call


def _register() -> None:
    for command in COMMANDS:
        make = app.command(command.name, help=command.help, epilog=command.example)
        make(_make(command, command.settings_model()))


_register()


# The libraries' own bars and advice ("install torchvision ...") would stand between our lines and help nobody.
_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def _fail(message: str, code: int) -> NoReturn:
    console.log_console.print(f"error: {message}", markup=False, style="red")
    sys.exit(code)


def main() -> None:
    """Entry point: exit code 0 done, 1 a fault of ours, 2 the user can mend it, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file in an old encoding: Chinese as \\u7535 rather than a crash
            stream.reconfigure(errors="backslashreplace")
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    try:
        sys.argv[1:] = rewrite(sys.argv[1:])
        app()
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        console.log_console.print(str(stop), markup=False)
        sys.exit(130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `lapwan ... | head`
        sys.stderr.close()
        sys.exit(0)
