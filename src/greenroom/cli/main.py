"""Parse, dispatch, and turn what a user can act on into one line and exit code 2."""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence

from greenroom import __version__
from greenroom.cli import analyze, bench, chat, eval, pack, plan, run, trace, verify
from greenroom.errors import GreenroomError

_COMMANDS = (run, chat, pack, verify, plan, bench, trace, analyze, eval)


class _Parser(argparse.ArgumentParser):
    """argparse's own errors in our form: one line, exit code 2."""

    def error(self, message: str) -> "None":  # type: ignore[override]
        sys.stderr.write(f"greenroom: {message} (see {self.prog} --help)\n")
        sys.exit(2)


def _replace_what_stdout_lacks() -> None:
    """An answer's characters that the terminal's encoding does not have become question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what a user can act on, 130 after Ctrl-C."""
    parser = _Parser(prog="greenroom", description="Run Mixture-of-Experts models that are bigger than your memory.")
    parser.add_argument("--version", action="version", version=f"greenroom {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in _COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    _replace_what_stdout_lacks()
    try:
        code: int = options.execute(options)
        sys.stdout.flush()
        return code
    except GreenroomError as error:
        if options.verbose:
            traceback.print_exc()
        print(f"greenroom: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        if options.verbose:
            traceback.print_exc()
        print("greenroom: the system gives this process no more memory: give a smaller --ram", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngreenroom: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
