"""Share what the reproductions' scripts do alike: arguments, exit codes and mistakes in one line."""

import argparse
import sys
from collections.abc import Callable

from torchrl_maxmin.core.errors import SystemFailure, UserError
from torchrl_maxmin.core.progress import quiet
from torchrl_maxmin.core.system_errors import explained
from torchrl_maxmin.core.text_escape import terminal

__all__ = ["exit_code", "make_parser", "run_main"]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help is a script's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_code(name: str, main: Callable[[], int | None]) -> int:
    """Run a script: 0 or what it returns, or one line: 2 for a mistake, 1 for what the system refuses.

    Args:
        name: Of the reproduction, which opens the line.
        main: Parses its arguments and runs.
    """
    try:
        with explained():
            return main() or 0
    except (UserError, SystemFailure) as error:
        sys.stderr.write(terminal(f"{name}: error: {error}", most=2000) + "\n")
        return 2 if isinstance(error, UserError) else 1


def run_main(name: str, main: Callable[[], int | None]) -> None:
    """Run a script without libraries' notices and exit by :func:`exit_code`, whose arguments it takes."""
    quiet()
    sys.exit(exit_code(name, main))
