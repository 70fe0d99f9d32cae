"""The Typer app. A command's settings are imported only when that command is used, so that --help is instant.

Nothing here imports torch; `lapwan --help`, an unknown command and the completion of a command's name import no
pydantic either.

How to add a command: a settings model in `lapwan/settings/`, `run(settings, options)` in `lapwan/commands/`, and one
row in `COMMANDS` of `lapwan/commands/table.py`.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from lapwan import __version__
from lapwan.cli_aliases import rewrite
from lapwan.commands.table import COMMANDS, Command
from lapwan.errors import Interrupted, UserError, nearest
from lapwan.files import finished_text, forget_finished
from lapwan.interrupt import INTERRUPTED, command_line, stop_on_signals, was_interrupted


def _without_bool(params: Any) -> Any:
    """The parameters of a command, its --help without the `<bool>` that Typer writes behind a flag."""
    for param in params:
        if param.name == "help":
            param.metavar = ""
    return params


class _LazyCommand(TyperCommand):
    """A row of the table as a command; its settings are imported and its options built on first use."""

    def __init__(self, row: Command) -> None:
        super().__init__(row.name, help=row.help, epilog=row.example)
        self._row = row

    def get_params(self, ctx: Any) -> Any:
        """The options; a run, a help and a completion all need them first."""
        if not self.params:
            from lapwan.commands.options import click_command

            command = click_command(self._row)
            self.params, self.callback = command.params, command.callback
        return _without_bool(super().get_params(ctx))


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """A KeyboardInterrupt as `Interrupted`: Typer would end the process with 130 and without a word."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, Interrupted) or not (isinstance(error, KeyboardInterrupt) or was_interrupted()):
            raise
        raise _now_interrupted() from None


def _now_interrupted() -> Interrupted:
    """With what is finished."""
    kept = finished_text()
    return Interrupted(f"interrupted; {kept or 'no output was written'}", "--overwrite" if kept else "")


_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of the click inside Typer, or beside an older one


@contextmanager
def _mistakes_in_a_line(parsed: Any = None) -> Iterator[None]:
    """What Typer shows of a mistyped command line in a box, with its usage above, as a `UserError`.

    Args:
        parsed: the context of `lapwan` itself, which knows the command.
    """
    try:
        yield
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help itself
            raise
        command = getattr(parsed, "invoked_subcommand", None)
        raise _mistyped(error, f"lapwan {command}" if command else "lapwan") from None


def _mistyped(error: Any, path: str) -> UserError:
    context = error.ctx
    path = path if context is None else context.command_path
    text = error.format_message().rstrip(".").replace(". Did you mean ", "; did you mean ")
    if (option := getattr(error, "option_name", None)) and text.startswith("No such option"):
        known = [] if context is None else [
            name for param in context.command.get_params(context) for name in (*param.opts, *param.secondary_opts)]
        text = f"no option '{option}'{nearest(option, known)}"
    return UserError(f"{path}: {text[:1].lower()}{text[1:]}; `{path} -h` shows what it takes")


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "commands": {row.name: _LazyCommand(row) for row in COMMANDS}})

    def make_context(self, *arguments: Any, **extra: Any) -> Any:
        """Parse the options of `lapwan` itself."""
        with _interrupts_raised(), _mistakes_in_a_line():
            return super().make_context(*arguments, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse the options of the command and run it. Of the errors that nothing caught those that the user can mend
        become a `UserError`."""
        try:
            with _interrupts_raised(), _mistakes_in_a_line(ctx):
                return super().invoke(ctx)
        except (UserError, BrokenPipeError):
            raise
        except Exception as error:
            from lapwan import console
            from lapwan.faults import user_error

            if (mended := user_error(error)) is None:
                raise
            console.detail("".join(traceback.format_exception(error)))
            raise mended from None

    def get_params(self, ctx: Any) -> Any:
        """The options of `lapwan` itself. Those of Typer's shell completion are one line of the help.

        A flag that is not given becomes False: Typer would pass None to pydantic, whose import takes longer than
        everything else.
        """
        params = _without_bool(super().get_params(ctx))
        for param in params:
            if param.is_flag and param.default is None:
                param.default = False
            if param.name == "install_completion":
                param.metavar, param.help = "", "Set up completion in this shell."
            elif param.name == "show_completion":
                param.hidden = True
        return params


_PIPE = 141  # exit code, 128 + SIGPIPE

app = typer.Typer(
    name="lapwan",
    cls=_Commands,
    help="Fine-tune, specialise, align and diagnose Wan2.2 video models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    """Fine-tune, specialise, align and diagnose Wan2.2 video models."""
    if version:
        from lapwan import console

        console.results.print(f"lapwan {__version__}")
        raise typer.Exit


# The progress bars and advice of other libraries ("install torchvision ...") would only clutter the log.
_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def _stop(message: str, code: int, style: str | None = None) -> NoReturn:
    from lapwan import console

    console.log_console.print(message, markup=False, style=style)
    sys.exit(code)


def _interrupted(stop: Interrupted, words: list[str]) -> str:
    """What an interrupted command keeps, and the command that continues or repeats it."""
    if stop.again is None:
        return str(stop)
    return f"{stop}; to continue: {command_line(words, stop.again)}"


def _end_of_pipe() -> NoReturn:
    """End without a word, as SIGPIPE ends a program; the interpreter's last flush must not find the pipe again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # not a file, or closed
            stream.flush()
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    sys.exit(_PIPE)


def main() -> None:
    """Entry point. Exit codes: 0 success, 1 a bug in lapwan, 2 an error that the user can fix, 130 interrupted, 141 the
    reader of its output has gone."""
    if sys.stdout is None or sys.stderr is None:  # closed by the caller (2>&-)
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  until the end of the process
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # another encoding than UTF-8: Chinese as \\u7535, not a crash
            stream.reconfigure(errors="backslashreplace")
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    _let_segments_grow()
    typed = sys.argv[1:]
    try:
        _run(typed)
    except (BrokenPipeError, SystemExit) as stop:
        # `lapwan ... | head`; rich and Typer make a SystemExit of it, with the exit code of a fault.
        if isinstance(stop, BrokenPipeError) or isinstance(stop.__context__, BrokenPipeError):
            _end_of_pipe()
        raise


def _let_segments_grow() -> None:
    """Ask torch's CUDA allocator for segments that grow: gaps between streamed blocks otherwise cost more than a tenth
    of a small `memory`. Torch reads the variable when CUDA starts; what the user has set stays."""
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _run(typed: list[str]) -> None:
    try:
        with _interrupts_raised():
            stop_on_signals()
            forget_finished()
            sys.argv[1:] = rewrite(typed)
            app()
    except UserError as error:
        _stop(f"error: {error}", 2, style="red")
    except Interrupted as stop:
        _stop(_interrupted(stop, typed), INTERRUPTED)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # Typer's own, without a word, for what came after the command had returned
            _stop(_interrupted(_now_interrupted(), typed), INTERRUPTED)
        raise
    finally:
        sys.stdout.flush()
