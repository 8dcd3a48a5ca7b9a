"""The command line: `python -m fmlib encoders | layers | params | run | book`.

Exit status: 0 done, 1 failed, 2 bad call, 130 interrupted. Tables and results go to stdout, errors
and progress to stderr. Every subcommand imports what it needs itself, so that `--help` is
immediate.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmlib import runs

if TYPE_CHECKING:
    import pandas as pd

DONE, FAILED, BAD_CALL, INTERRUPTED = 0, 1, 2, 130


def _print_table(frame: "pd.DataFrame", as_json: bool) -> None:
    if as_json:
        print(frame.to_json(orient="records", indent=2))
        return
    if frame.empty:
        print("(none)")
        return
    text = frame.astype(object).where(frame.notna(), "-").map(_cell)
    widths = [max(len(str(name)), *(len(t) for t in text[name])) for name in text.columns]
    for line in [text.columns, *text.to_numpy()]:
        padded = [str(item).ljust(width) for item, width in zip(line, widths, strict=True)]
        print("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(str(value).split())


def _encoders(arguments: argparse.Namespace) -> int:
    from fmlib import encoders

    _print_table(encoders.available(), arguments.json)
    return DONE


def _layers(arguments: argparse.Namespace) -> int:
    from fmlib import encoders

    try:
        encoder = encoders.load(arguments.name)
    except (ValueError, KeyError) as error:  # an unknown name, with the choices in the message
        raise runs.BadCall(error.args[0] if error.args else str(error)) from error
    except encoders.UnavailableError as error:  # a known name whose weights are not here
        print(f"fmlib: {error}", file=sys.stderr)
        return FAILED
    _print_table(encoder.layers(every=arguments.every), arguments.json)
    return DONE


def _params(arguments: argparse.Namespace) -> int:
    frame = runs.parameters(arguments.notebook)
    if not arguments.json:
        frame["default"] = [repr(value) for value in frame["default"]]
    _print_table(frame, arguments.json)
    return DONE


def _run(arguments: argparse.Namespace) -> int:
    values = runs.from_text(arguments.notebook, arguments.parameter)
    result = runs.run(
        arguments.notebook,
        profile=arguments.profile,
        parameters=values,
        directory=arguments.output,
        failed=arguments.failed,
        timeout=arguments.timeout,
        progress=False if arguments.quiet else None,
    )
    if arguments.table:
        from fmlib import store

        with store.atomic_path(arguments.table) as whole:
            runs.table([result.directory]).to_parquet(whole, index=False)
    if not arguments.quiet:
        seconds = result.manifest["wall_seconds"]
        print(f"{_shown(result.notebook)}: {len(result.metrics)} metrics in {seconds:.1f} s")
    return DONE


def _book(arguments: argparse.Namespace) -> int:
    runs.import_nbformat()
    from fmlib import book

    try:
        built = book.build(profile=arguments.profile, offline=arguments.offline)
    except book.BookError as error:
        print(f"fmlib: {error}", file=sys.stderr)
        return FAILED
    print(f"{_shown(built.html / 'index.html')}: {built.pages} pages in {built.seconds:.1f} s")
    return DONE


def _shown(path: Path) -> str:
    """A path as a reader in the current folder would type it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON records, not a table")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmlib", description=(__doc__ or "").split("\n")[0]
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command(
        "encoders", _encoders, "List the encoders that are there and how to get the others."
    )
    _json_option(sub)

    sub = command("layers", _layers, "List an encoder's layers.")
    sub.add_argument("name", metavar="NAME", help="e.g. efficientnet_lite0 or timm:resnet50")
    sub.add_argument("--every", action="store_true", help="every module, not only the main ones")
    _json_option(sub)

    sub = command("params", _params, "List a notebook's parameters.")
    sub.add_argument("notebook", metavar="NOTEBOOK")
    _json_option(sub)

    sub = command("run", _run, "Execute a notebook; keep its result only if every cell ran.")
    sub.add_argument("notebook", metavar="NOTEBOOK")
    sub.add_argument("--profile", default="default", metavar="P", help="entry of profiles.yml")
    sub.add_argument(
        *("-p", "--parameter"),
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter; lists as '[a, b]' or a,b; may be repeated",
    )
    sub.add_argument("--output", metavar="DIR", help="folder of the result")
    sub.add_argument("--failed", metavar="DIR", help="folder for the remains of a failure")
    sub.add_argument("--table", metavar="FILE", help="also write the metrics to this Parquet file")
    sub.add_argument(
        "--timeout", type=float, metavar="S", help="longest time for one cell, seconds"
    )
    sub.add_argument("--quiet", action="store_true", help="print errors only")

    sub = command("book", _book, "Build the book from the runs that are there.")
    sub.add_argument("--profile", default="default", metavar="P", help="whose runs to show")
    sub.add_argument("--offline", action="store_true", help="pages without external requests")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parsed = _parser().parse_args(arguments)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # A scheduler ends a run with SIGTERM: stop the kernel and clean up as for Ctrl-C
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        status = parsed.function(parsed)
        sys.stdout.flush()  # here, where a closed pipe is caught
        return status
    except runs.BadCall as error:
        print(f"fmlib: {error}", file=sys.stderr)
        return BAD_CALL
    except runs.NotebookFailed as error:
        print(f"fmlib: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("fmlib: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` closed the pipe; let nothing be flushed into it on exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
