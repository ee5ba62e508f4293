"""The command line's entry point: all commands in one app, exit codes of errors, closed outputs.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed, 2 wrong
usage, 3 a vendor's tool failed, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from typing import Annotated, Any, cast

import typer

from mobilevd_deploy import __version__
from mobilevd_deploy.cli import export, look, measure, profile, use
from mobilevd_deploy.cli.options import fail
from mobilevd_deploy.errors import MobileVDError

app = typer.Typer(
    name="mobilevd-deploy",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take a trained MobileVD checkpoint to a Snapdragon phone.",
    epilog="Example: [bold]mobilevd-deploy export ckpt.pt -o clip-model[/] and then "
    "[bold]mobilevd-deploy generate photo.jpg --artifact clip-model -o clip.gif[/]",
)
for group in (export, use, profile, measure, look):  # the order of --help
    for command in group.commands.registered_commands:
        command.rich_help_panel = group.PANEL
        # Typer itself joins the lines of the first paragraph only.
        command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command.callback) or "")
    app.add_typer(group.commands, rich_help_panel=group.PANEL)

# Former options by command: what to write instead.
_NEW_SPELLING: dict[tuple[str | None, str | None], str] = {
    ("hub", "--adb"): "mobilevd-deploy profile phone [ARTIFACT] [--serial SERIAL]",
    ("hub", "--backend"): "mobilevd-deploy profile phone [ARTIFACT] --backend auto|npu|cpu",
    ("hub", "--host"): "mobilevd-deploy profile host [ARTIFACT]",
    ("hub", "--estimate"): "mobilevd-deploy profile estimate [ARTIFACT|PRESET] --device NAME",
    ("install", "--adb"): "mobilevd-deploy install [ARTIFACT] --serial SERIAL",
}


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line and exit. An error becomes a message and its exit code."""
    _open_closed_streams()
    as_json = "--json" in sys.argv
    try:
        code = _run(as_json)
        sys.stdout.flush()  # fails if the reader is gone or the disk is full
    except BrokenPipeError:
        code = 1
    except OSError as error:  # a path that the system refuses unexpectedly
        code = fail(
            str(error), "check the path, its permissions and the space on its disk", 1, as_json=as_json
        )
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again as it exits, and change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(as_json: bool) -> int:
    """Run the command and return the exit code. Raises OSError if an output cannot be written."""
    try:
        code = app(prog_name=app.info.name, standalone_mode=False) or 0
        if code == 130:  # typer's code for Ctrl-C
            raise KeyboardInterrupt
        return code
    except SystemExit as ended:
        return cast(int, ended.code)
    except MobileVDError as error:
        return fail(error.what, error.next_step, error.exit_code, as_json=as_json)
    except typer.TyperException as error:
        return _wrong_usage(error, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", "run the same command again to continue", 130, as_json=as_json)
    except MemoryError:
        next_step = "close other programs, or use a computer with more memory"
        return fail("not enough memory", next_step, 1, as_json=as_json)


def _wrong_usage(error: typer.TyperException, as_json: bool) -> int:
    usage = cast(Any, error)  # typer names no type for these attributes
    option = getattr(usage, "option_name", None)
    command = usage.ctx.command.name if getattr(usage, "ctx", None) else None
    instead = _NEW_SPELLING.get((command, option))
    if instead:
        return fail(error.message, instead, 2, as_json=as_json)
    if as_json:
        next_step = "the same command with --help explains its arguments"
        return fail(error.format_message(), next_step, 2, as_json=as_json)
    with contextlib.suppress(OSError):
        usage.show()
    return 2


def _open_closed_streams() -> None:
    """Open /dev/null for standard streams that the caller closed (`>&-`).

    Otherwise the next file that is opened gets the stream's number, and a library's writes to the stream end
    up in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            opened = open(os.devnull, mode)  # noqa: PTH123, SIM115
            if opened.fileno() != number:
                os.dup2(opened.fileno(), number)
            setattr(sys, name, opened)
