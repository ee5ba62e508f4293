"""Commands about speed and devices: traffic, report, jobs, devices; `profile` has a file of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mobilevd_deploy.cli.completion import complete_artifact_or_preset, complete_device
from mobilevd_deploy.cli.options import (
    DEFAULT_RECIPE,
    ArtifactFolder,
    Json,
    Quiet,
    RecipeName,
    expanded,
    open_artifact,
    open_hub,
    path_option,
    print_json,
    print_rich,
    show_progress,
)
from mobilevd_deploy.errors import UsageError

PANEL = "Measure"
commands = typer.Typer()


@commands.command(
    epilog="Examples: [bold]mobilevd-deploy traffic build/clip-model[/], "
    "[bold]traffic mobilevd --blocks 'down_blocks.0.*' --recipe npu-float --mode 3[/]",
)
def traffic(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|PRESET",
            parser=expanded,
            help="An artifact with context binaries, or a preset by name.",
            show_default=False,
            autocompletion=complete_artifact_or_preset,
        ),
    ],
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="Blocks of a preset, with shell wildcards; repeatable.", show_default="all"),
    ] = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    mode: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=3,
            help="Optimisation mode for a preset.",
            show_default="the recipe's mode",
        ),
    ] = None,
    picture: Annotated[
        Path | None, path_option(help="Also draw the result into this PNG file.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count the bytes to and from DRAM in the compiler's schedule: planned, not measured.

    A preset is compiled block by block with random weights, because schedules do not depend on values; graph
    forms and bits are those of --recipe. The result of an artifact is stored in ARTIFACT.profiles/.
    """
    from mobilevd_deploy.base.places import require_file_place, require_scratch
    from mobilevd_deploy.config.recipe import load_recipe
    from mobilevd_deploy.profiling.traffic import measure, write_picture

    if picture is not None:
        if picture.suffix != ".png":
            raise UsageError(f"{picture} is not a PNG file", next_step="use a name like traffic.png")
        require_file_place(picture)
    require_scratch()
    with show_progress(quiet or as_json) as progress:
        report = measure(what, load_recipe(recipe), blocks or ["*"], mode, progress)
    if picture is not None:
        write_picture(report, picture)
    if as_json:
        print_json(report.to_dict() | {"read": report.read, "written": report.written})
        return
    from mobilevd_deploy.cli.tables import render_traffic

    print_rich(render_traffic(report))


@commands.command(epilog="Example: [bold]mobilevd-deploy report build/clip-model[/]")
def report(artifact: ArtifactFolder = None, as_json: Json = False) -> None:
    """Show the newest profiles and estimates of an artifact side by side.

    Also writes them as a page, ARTIFACT.profiles/report.html. The page of the export is ARTIFACT/report.html.
    """
    from mobilevd_deploy.base.files import write_durably
    from mobilevd_deploy.profiling.store import load_traffic, newest_profiles, profiles_dir
    from mobilevd_deploy.report.profiles_page import render_profiles

    opened = open_artifact(artifact)
    profiles, planned = newest_profiles(opened), load_traffic(opened)
    if not (profiles or planned):
        raise UsageError(
            f"{opened.root} has no profile, estimate or traffic count yet",
            next_step=f"mobilevd-deploy profile hub|phone|host|estimate {opened.root}, "
            f"or mobilevd-deploy traffic {opened.root}",
        )
    page = profiles_dir(opened) / "report.html"
    write_durably(page, render_profiles(opened.manifest.name, profiles, planned))
    if as_json:
        values = {"page": page, "profiles": [profile.to_dict() for profile in profiles]}
        print_json(values | {"traffic": [report.to_dict() for report in planned]})
        return
    from mobilevd_deploy.cli.tables import render_comparison, traffic_line

    if profiles:
        print_rich(render_comparison(profiles))
    for one in planned:
        print(traffic_line(one))
    print(f"look at {page} and {opened.root / 'report.html'}")


@commands.command(epilog="Example: [bold]mobilevd-deploy jobs build/clip-model[/]")
def jobs(
    artifact: ArtifactFolder = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Show the last known states without asking AI Hub.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the AI Hub jobs that `profile` submitted for an artifact, and their states."""
    from mobilevd_deploy.profiling.hub.run import refresh_jobs

    opened = open_artifact(artifact)
    runs = refresh_jobs(opened, None if offline else open_hub())
    if as_json:
        print_json([dataclasses.asdict(run) for run in runs])
        return
    from mobilevd_deploy.cli.tables import render_jobs

    print_rich(render_jobs(runs) if runs else f"{opened.root}: no jobs were submitted")


@commands.command(
    epilog='Examples: [bold]mobilevd-deploy devices "Xiaomi 14 Pro"[/], [bold]devices --hub[/]',
)
def devices(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A phone or chip: list only phones with this chip.",
            show_default=False,
            autocompletion=complete_device,
        ),
    ] = None,
    from_hub: Annotated[bool, typer.Option("--hub", help="Ask AI Hub which phones it hosts now.")] = False,
    as_json: Json = False,
) -> None:
    """List phones, their chips and HTP versions, and the hosted phone that profiles each of them."""
    from mobilevd_deploy.config.devices import find
    from mobilevd_deploy.profiling.hub.hosted import list_devices

    chip = find(name).chip.name if name else None
    hosted = open_hub().devices() if from_hub else None
    rows = [row for row in list_devices(hosted) if chip in (None, row["chipset"])]
    if as_json:
        print_json(rows)
        return
    from mobilevd_deploy.cli.tables import render_devices

    print_rich(render_devices(rows, live=from_hub))
