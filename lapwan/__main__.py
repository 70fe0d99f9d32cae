"""The program: `lapwan`, and `python -m lapwan` as `accelerate launch -m lapwan ...` needs it."""

import sys

from lapwan.interrupt import end_on_signals, ignore_signals_at_exit, stop_on_signals


def main() -> None:
    """Take signals first: importing the command line already takes a moment."""
    stop_on_signals()
    ignore_signals_at_exit()
    from lapwan import cli

    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    end_on_signals(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
