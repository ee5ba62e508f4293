"""Options, arguments and output helpers that several commands share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobilevd_deploy.cli.completion import complete_artifact, complete_device, complete_recipe

if TYPE_CHECKING:
    from mobilevd_deploy.artifact.artifact import Artifact
    from mobilevd_deploy.base.progress import Progress
    from mobilevd_deploy.model.lora import Lora
    from mobilevd_deploy.profiling.hub.client import Hub


def given_path(text: str) -> Path:
    """Read a path from the command line, with `~` expanded also where the shell does not: `--output=~/x`."""
    return Path(expanded(text))


def expanded(text: str) -> str:
    """Expand a leading `~` or `~user`; the name of an unknown user stays as it is.

    Raises typer.BadParameter if the home folder is unknown.
    """
    path = os.path.expanduser(text)  # noqa: PTH111  (pathlib refuses a file that is called ~draft.gif)
    if path == "~" or path.startswith("~/"):
        raise typer.BadParameter(f"{text}: the home folder is unknown, because HOME is not set")
    return path


def path_option(*names: str, help: str, show_default: bool | str = True, metavar: str = "PATH") -> Any:
    """Return an option that takes a path; every path on the command line is read by `given_path`."""
    return typer.Option(*names, help=help, show_default=show_default, metavar=metavar, parser=given_path)


def path_argument(metavar: str, *, help: str, show_default: bool | str = False, complete: Any = None) -> Any:
    """Return an argument that takes a path."""
    return typer.Argument(
        metavar=metavar, help=help, show_default=show_default, parser=given_path, autocompletion=complete
    )


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]

ArtifactFolder = Annotated[
    Path | None,
    path_argument(
        "ARTIFACT",
        help="An exported artifact.",
        show_default="the newest one below this folder",
        complete=complete_artifact,
    ),
]
CheckpointFile = Annotated[
    Path | None,
    path_argument(
        "CHECKPOINT",
        help="A checkpoint: our .safetensors or .pt, Stable Video Diffusion as a folder or single file, a "
        "UNet alone (with --base), or an id of the Hugging Face Hub.",
        show_default="the demo checkpoint of the package",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="CHECKPOINT",
        parser=expanded,
        help="Checkpoint that gives the configuration and what CHECKPOINT lacks, if that is a UNet alone.",
        show_default=False,
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        parser=expanded,
        help="A LoRA to merge into the UNet (peft, diffusers or kohya names); repeatable.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        metavar="NAME|FILE",
        help="A shipped recipe by name, or a TOML file.",
        autocompletion=complete_recipe,
        parser=expanded,
    ),
]
DEFAULT_RECIPE = "xiaomi-14-pro"
CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}
Calibration = Annotated[
    list[Path] | None,
    path_option(
        "--calibration",
        "-c",
        help="Pictures, or folders of pictures, that calibrate the quantisation; repeatable.",
        show_default="generated pictures",
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        "-d",
        help="A phone or chip by name; repeatable.",
        show_default=False,
        autocompletion=complete_device,
    ),
]
Components = Annotated[
    str | None,
    typer.Option(help="Profile only these components, separated by commas.", show_default="all"),
]
Samples = Annotated[int, typer.Option(min=2, max=10_000, help="Number of timed calls.")]
Serial = Annotated[
    str,
    typer.Option(
        "--serial",
        help="Serial number of the phone, if several are attached.",
        show_default="ANDROID_SERIAL",
    ),
]


def open_artifact(folder: Path | None) -> Artifact:
    """Open the artifact in `folder`, or without one the newest below the working directory."""
    from mobilevd_deploy.artifact.artifact import Artifact, find_newest

    return Artifact.open(folder) if folder else find_newest(Path())


def checkpoint_or_demo(checkpoint: Path | None) -> Path:
    """Return `checkpoint`, or without one the demo checkpoint of the package."""
    from mobilevd_deploy.config.data import data_dir

    return checkpoint or data_dir("models") / "demo.safetensors"


def base_name(checkpoint: Path) -> str:
    """Return a checkpoint's name without the file ending: a folder's name is whole, as in svd_v1.1."""
    path = checkpoint.resolve()
    return path.stem if path.suffix in CHECKPOINT_SUFFIXES and not path.is_dir() else path.name


def parse_loras(texts: list[str] | None) -> list[Lora]:
    """Read the values of `--lora`."""
    from mobilevd_deploy.model.lora import parse_lora

    return [parse_lora(text) for text in texts or ()]


def split_names(names: str | None) -> tuple[str, ...]:
    """Split names at their commas: "unet, decoder" gives two."""
    return tuple(name.strip() for name in names.split(",")) if names else ()


def open_hub() -> Hub:
    """Open AI Hub's client. Warn about a token that others can read, even if the rest is quiet."""
    from mobilevd_deploy.profiling.hub.client import Hub

    opened = Hub.open()
    if opened.exposed:
        print(f"warning: {': '.join(opened.exposed)}", file=sys.stderr)
    return opened


def show_progress(quiet: bool) -> Progress:
    """Return the progress display on standard error, or a silent one."""
    from mobilevd_deploy.base.progress import make_progress

    return make_progress(quiet=quiet)


def print_json(values: Any) -> None:
    """Print plain values as JSON on standard output; paths become strings."""
    print(json.dumps(values, indent=2, default=str, allow_nan=False))


def print_rich(renderable: Any) -> None:
    """Print a table or text on standard output."""
    from rich.console import Console

    # Rich wraps at 80 columns without a terminal; a log or a file gets the whole table.
    Console(width=None if sys.stdout.isatty() else 160).print(renderable)


def fail(what: str, next_step: str | None, code: int, *, as_json: bool) -> int:
    """Print an error and return its exit code. A closed output does not change the code."""
    try:
        if as_json:
            print_json({"error": what, "next_step": next_step, "exit_code": code})
            sys.stdout.flush()
        print(f"error: {what}", file=sys.stderr)
        if next_step:
            print(f" next: {next_step}", file=sys.stderr)
    except OSError:
        pass  # no reader for the message
    return code
