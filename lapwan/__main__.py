"""The program: `lapwan`, and `python -m lapwan` as `accelerate launch -m lapwan ...` needs it."""

import sys

from lapwan.interrupt import INTERRUPTED, stop_on_signals


def main() -> None:
    """Take signals first: importing the command line already takes a moment."""
    stop_on_signals()
    try:
        from lapwan import cli
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        sys.exit(INTERRUPTED)
    cli.main()


if __name__ == "__main__":
    main()
