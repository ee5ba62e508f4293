"""Commands that use an artifact: generate, install, pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilevd_deploy.cli.completion import complete_artifact
from mobilevd_deploy.cli.options import (
    ArtifactFolder,
    Json,
    Quiet,
    Serial,
    given_path,
    open_artifact,
    path_argument,
    path_option,
    print_json,
    show_progress,
)

PANEL = "Use"
commands = typer.Typer()


@commands.command(
    epilog="Example: [bold]mobilevd-deploy generate photo.jpg -a build/clip-model -o clip.mp4 --seed 7[/]",
)
def generate(
    image: Annotated[
        Path, path_argument("IMAGE", help="A picture of any size; it is scaled and cropped to fit.")
    ],
    output: Annotated[
        Path,
        path_option("--output", "-o", help="The file to write: clip.gif, clip.mp4, or frames as sheet.png."),
    ] = Path("clip.gif"),
    artifact: Annotated[
        Path | None,
        typer.Option(
            "--artifact",
            "-a",
            metavar="PATH",
            help="An exported artifact.",
            show_default="the newest one below this folder",
            autocompletion=complete_artifact,
            parser=given_path,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same clip on every machine.")
    ] = 0,
    frames_dir: Annotated[
        Path | None, path_option(help="Also write every frame as PNG into this folder.", show_default=False)
    ] = None,
    sheet: Annotated[
        Path | None, path_option(help="Also write input and frames side by side as PNG.", show_default=False)
    ] = None,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Enlarge the clip by this factor.")] = 1,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            "-p",
            help="onnxruntime execution provider; repeatable, best first. Or npu-sim: the context binaries "
            "on the HTP simulator; or quantised: the quantised graphs on the CPU.",
            show_default="CPU",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a clip from one picture with an exported artifact."""
    from mobilevd_deploy.artifact.artifact import Artifact, find_newest
    from mobilevd_deploy.generate import generate as make_clip

    opened = Artifact.open(artifact) if artifact else find_newest(Path(), advice="name one with --artifact")
    with show_progress(quiet or as_json) as progress:
        clip = make_clip(
            opened,
            image,
            seed=seed,
            provider=provider or "CPUExecutionProvider",
            scale=scale,
            output=output,
            frames_dir=frames_dir,
            sheet=sheet,
            progress=progress,
        )
    count, _, height, width = clip.frames.shape
    if as_json:
        print_json(
            {
                "artifact": str(opened.root),
                "clip": str(output),
                "written": [str(path) for path in clip.written],
                "picture": clip.picture,
                "seed": seed,
                "frames": count,
                "fps": clip.fps,
            }
        )
        return
    print(f"{output}: {count} frames of {width}x{height} at {clip.fps} fps, seed {seed}")


@commands.command(
    epilog="Example: [bold]mobilevd-deploy install build/clip-model --serial 3f9c2a71[/]",
)
def install(
    artifact: ArtifactFolder = None,
    serial: Serial = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Install an artifact into the app on the attached phone; every file's digest is checked there."""
    from mobilevd_deploy.profiling.phone.adb import Adb
    from mobilevd_deploy.profiling.phone.run import ARTIFACTS
    from mobilevd_deploy.profiling.phone.run import install as install_on

    opened = open_artifact(artifact)
    with show_progress(quiet or as_json) as progress:
        phone = Adb.open(serial)
        name = install_on(opened, phone, progress)
    if as_json:
        print_json({"artifact": str(opened.root), "serial": phone.serial, "path": f"{ARTIFACTS}/{name}"})
        return
    print(f"{name} is on {phone.serial}: open the app, or mobilevd-deploy profile phone {opened.root}")


@commands.command(
    epilog="Example: [bold]mobilevd-deploy pack build/clip-model -o clip-model.mvd[/]",
)
def pack(
    artifact: ArtifactFolder = None,
    output: Annotated[
        Path | None,
        path_option("--output", "-o", help="The file to write.", show_default="ARTIFACT.mvd in this folder"),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an artifact as one file, which the app opens from any storage of the phone."""
    from mobilevd_deploy.artifact.pack import SUFFIX
    from mobilevd_deploy.artifact.pack import pack as write
    from mobilevd_deploy.base.places import require_file_place

    opened = open_artifact(artifact)
    output = output or Path(f"{opened.root.resolve().name}{SUFFIX}")
    require_file_place(output, opened.bytes)
    output.parent.mkdir(parents=True, exist_ok=True)
    with show_progress(quiet or as_json) as progress:
        written = write(opened, output, progress)
    size = written.stat().st_size
    if as_json:
        print_json({"artifact": str(opened.root), "file": str(written), "bytes": size})
        return
    print(f"{written}: {size / 1e6:,.1f} MB; send it to the phone and open it with the app")
