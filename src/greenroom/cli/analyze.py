"""`greenroom analyze T`: what a routing trace shows, as a table, JSON and pictures. Imports no torch."""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from greenroom.cli import options as shared
from greenroom.errors import ConfigError
from greenroom.folders import nearest

if TYPE_CHECKING:
    from greenroom.analyze import Report


def add(commands: Any) -> None:
    """Register the command."""
    parser: argparse.ArgumentParser = commands.add_parser("analyze", help="caches and guesses on a recorded trace")
    parser.add_argument("trace", help="a file written by greenroom trace")
    parser.add_argument("--tokens", choices=("decode", "prompt", "all"), default="decode", help="which tokens")
    parser.add_argument("--sizes", metavar="N,N,…", help="experts kept per layer (default: eight, up to all)")
    parser.add_argument("--policies", metavar="NAME,…", help="eviction policies (default: all)")
    parser.add_argument("--plots", metavar="FOLDER", help="where to draw PNG and SVG (default: beside the trace)")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    shared.add_common(parser)
    parser.set_defaults(execute=execute)


def execute(options: argparse.Namespace) -> int:
    """Print the table, draw, and print the JSON."""
    from greenroom.analyze import analyze
    from greenroom.cache import POLICIES
    from greenroom.progress import Progress
    from greenroom.trace import read_trace

    sizes, names = _numbers(options.sizes), _names(options.policies)
    trace = read_trace(options.trace)
    folder = Path(options.plots) if options.plots else _beside(Path(options.trace))
    if not options.no_plots and importlib.util.find_spec("matplotlib") is not None:
        _check(folder)  # before what takes long
    passes = 1 + len(POLICIES if names is None else names)
    with Progress("replaying", trace.tokens * passes, unit="tokens") as progress:
        report = analyze(trace, which=options.tokens, sizes=sizes, policies=names, advance=progress.advance)
    print(report.table(), flush=True)
    drawn = [] if options.no_plots else _draw(report, folder)
    if options.json:
        shared.print_json({**report.json(), "plots": drawn})
    return 0


def _beside(trace: Path) -> Path:
    """Where to draw by default: a folder of the trace's name without its suffix, or with `-plots` where it has none."""
    folder = trace.with_suffix("")
    return trace.with_name(f"{trace.name}-plots") if folder == trace else folder


def _check(folder: Path) -> None:
    """Raise ConfigError where nothing can be drawn into `folder`. Makes nothing."""
    try:
        tempfile.TemporaryFile(dir=nearest(folder)).close()
    except OSError as error:
        raise ConfigError(
            f"cannot draw into {folder} ({error.strerror or error}): give another with --plots"
        ) from error


def _draw(report: "Report", folder: Path) -> "list[str]":
    """Paths of the pictures; none, and a line that says why, where matplotlib is missing or nothing was routed."""
    if not report.requests:
        return []
    try:
        from greenroom.analyze.figures import draw
    except ImportError:
        print("greenroom: no pictures without matplotlib: pip install 'greenroom[plot]'", file=sys.stderr)
        return []
    paths = draw(report, folder)
    print(f"pictures: {', '.join(path.name for path in paths)} in {folder}")
    return [str(path) for path in paths]


def _numbers(text: "str | None") -> "list[int] | None":
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--sizes {text}: give whole numbers with commas, as in 4,8,16") from None


def _names(text: "str | None") -> "list[str] | None":
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
