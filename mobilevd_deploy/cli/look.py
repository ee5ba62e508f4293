"""Commands that change nothing: inspect, diff, doctor."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import typer

from mobilevd_deploy.cli.completion import complete_artifact, complete_artifact_or_preset, complete_preset
from mobilevd_deploy.cli.options import (
    DEFAULT_RECIPE,
    Base,
    Json,
    Loras,
    Quiet,
    RecipeName,
    expanded,
    parse_loras,
    path_argument,
    print_json,
    print_rich,
    show_progress,
)
from mobilevd_deploy.errors import UsageError

PANEL = "Look"
commands = typer.Typer()


@commands.command(
    epilog="Examples: [bold]mobilevd-deploy inspect ckpt.pt[/], [bold]inspect mobilevd[/], "
    "[bold]inspect --ladder --json[/]",
)
def inspect(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT|PRESET|ARTIFACT",
            parser=expanded,
            help="A checkpoint, preset or artifact.",
            show_default=False,
            autocompletion=complete_artifact_or_preset,
        ),
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="Compare the paper's ablation with our counts, for all presets.")
    ] = False,
    base: Base = None,
    lora: Loras = None,
    as_json: Json = False,
) -> None:
    """Show structure, temporal blocks kept and dropped, funnels, parameters and FLOPs."""
    if (what is None) == (not ladder):
        raise UsageError("name one thing to inspect, or --ladder", next_step="mobilevd-deploy inspect --help")
    from mobilevd_deploy.cli.tables import render_inspection, render_ladder
    from mobilevd_deploy.inspection import inspect as inspect_one
    from mobilevd_deploy.inspection import ladder as count_ladder

    if what is None:
        with show_progress(as_json) as progress:
            rows = count_ladder(progress)
        print_json(rows) if as_json else print_rich(render_ladder(rows))
        return
    if base or lora:
        from mobilevd_deploy.model.checkpoint import open_checkpoint

        with show_progress(as_json) as progress:
            result = inspect_one(
                open_checkpoint(what, base=base, loras=parse_loras(lora), notice=progress.say)
            )
    else:
        result = inspect_one(what)
    print_json(result) if as_json else print_rich(render_inspection(result))


@commands.command(
    epilog="Example: [bold]mobilevd-deploy diff build/clip-model build/clip-model-npu[/]",
)
def diff(
    a: Annotated[Path, path_argument("A", help="An artifact.", complete=complete_artifact)],
    b: Annotated[Path, path_argument("B", help="Another artifact.", complete=complete_artifact)],
    all_rows: Annotated[bool, typer.Option("--all", help="Show equal quantities too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two artifacts: size, parameters, FLOPs, op counts, drift, and the newest profiles of both."""
    from mobilevd_deploy.artifact.artifact import Artifact
    from mobilevd_deploy.artifact.diff import diff as compare
    from mobilevd_deploy.profiling.store import diff_profiles

    before, after = Artifact.open(a), Artifact.open(b)
    rows = (*compare(before, after), *diff_profiles(before, after))
    if as_json:
        # JSON has no infinity; a drift of inf means identical outputs.
        sides = [
            {side: "identical" if v == math.inf else v for side, v in (("a", r.a), ("b", r.b))} for r in rows
        ]
        print_json([vars(r) | shown | {"equal": r.a == r.b} for r, shown in zip(rows, sides, strict=True)])
        return
    from mobilevd_deploy.cli.tables import render_diff

    table = render_diff([row for row in rows if all_rows or row.a != row.b], str(a), str(b))
    print_rich(table if table.row_count else "no difference in size, parameters, FLOPs, ops, drift or time")


@commands.command(
    epilog="Examples: [bold]mobilevd-deploy doctor mobilevd[/], [bold]doctor --recipe onnx[/]",
)
def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="A preset or TOML file; its size decides how much memory and disk are needed.",
            autocompletion=complete_preset,
            parser=expanded,
        ),
    ] = "demo",
    recipe: RecipeName = DEFAULT_RECIPE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check whether this computer is ready for a recipe, and say how to get what is missing.

    The exit code is 0 if this computer has everything that the recipe needs. AI Hub, a phone and the tools
    for the app are optional.
    """
    from mobilevd_deploy.cli.tables import finding_line
    from mobilevd_deploy.config.presets import load_preset
    from mobilevd_deploy.config.recipe import load_recipe
    from mobilevd_deploy.doctor import examine, is_ready

    chosen, spec = load_recipe(recipe), load_preset(model).model
    with show_progress(quiet or as_json) as progress:
        findings = examine(chosen, spec, Path(), progress)
    ready = is_ready(findings)
    if as_json:
        values = {"ready": ready, "recipe": chosen.name, "model": spec.name}
        print_json(values | {"findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        print(*map(finding_line, findings), sep="\n")
    raise typer.Exit(0 if ready else 1)
