"""Commands that make and check things: export, tune, verify, init, train-demo."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from mobilevd_deploy.cli.completion import complete_preset, complete_target
from mobilevd_deploy.cli.options import (
    DEFAULT_RECIPE,
    ArtifactFolder,
    Base,
    Calibration,
    CheckpointFile,
    Json,
    Loras,
    Quiet,
    RecipeName,
    base_name,
    checkpoint_or_demo,
    expanded,
    open_artifact,
    parse_loras,
    path_option,
    print_json,
    print_rich,
    show_progress,
)
from mobilevd_deploy.errors import ArtifactError, UsageError

PANEL = "Export"
commands = typer.Typer()


@commands.command(
    epilog="Example: [bold]mobilevd-deploy export ckpt.pt --recipe npu-float -o build/clip-model[/]",
)
def export(
    checkpoint: CheckpointFile = None,
    base: Base = None,
    lora: Loras = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    output: Annotated[
        Path | None,
        path_option(
            "--output", "-o", help="Folder of the artifact.", show_default="CHECKPOINT-RECIPE in this folder"
        ),
    ] = None,
    calibration: Calibration = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Chip to compile for by any name, such as SM8650 or 8gen3; repeatable.",
            show_default="the recipe's chips",
            autocompletion=complete_target,
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Split the UNet into this many context binaries.",
            show_default="the fewest that fit 2 GiB and compile in 6.5 GB each",
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite, verify and export a checkpoint. The artifact is a folder with everything that a runner needs.

    After an interruption at any moment, the same command continues after the last finished stage.
    """
    from mobilevd_deploy.config.recipe import load_recipe

    chosen = load_recipe(recipe)
    if target or parts:
        chosen = chosen.compiled_for(target or (), parts)
    checkpoint = checkpoint_or_demo(checkpoint)
    output = output or Path(f"{base_name(checkpoint)}-{chosen.name}")
    with show_progress(quiet or as_json) as progress:
        progress.say(f"{checkpoint.name} -> {output} with recipe {chosen.name}")
        from mobilevd_deploy.deploy import deploy

        artifact = deploy(
            checkpoint,
            chosen,
            output,
            progress,
            calibration=calibration or (),
            base=base,
            loras=parse_loras(lora),
        )
    if as_json:
        print_json({"artifact": str(artifact.root), **json.loads(artifact.manifest.to_json())})
        return
    from mobilevd_deploy.cli.tables import export_lines

    print(*export_lines(artifact), sep="\n")


@commands.command(
    epilog="Example: [bold]mobilevd-deploy tune ckpt.pt --target-sqnr 28 -o my.toml[/] and then "
    "[bold]mobilevd-deploy export ckpt.pt --recipe my.toml[/]",
)
def tune(
    checkpoint: CheckpointFile = None,
    base: Base = None,
    lora: Loras = None,
    output: Annotated[Path, path_option("--output", "-o", help="The recipe to write, a TOML file.")] = Path(
        "tuned.toml"
    ),
    recipe: RecipeName = DEFAULT_RECIPE,
    target_sqnr: Annotated[
        float | None,
        typer.Option(
            help="SQNR of the UNet against float, in dB: find the lowest cost that reaches it.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Bit operations of the UNet relative to W8A16 throughout (W8A8: about 0.5): find the best "
            "SQNR at no more than this cost.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find which blocks of the UNet work with 8-bit activations and which need more bits, and write a recipe.

    The new recipe differs from --recipe in the UNet's bit widths only. Export it with the same --calibration.
    Measurements stay in OUTPUT.work: after an interruption the same command continues, and a search for
    another goal starts from them.
    """
    from mobilevd_deploy.base.places import require_distinct, require_file_place
    from mobilevd_deploy.config.recipe import load_recipe

    chosen = load_recipe(recipe)
    require_distinct([output], [Path(recipe), checkpoint_or_demo(checkpoint)])
    require_file_place(output)
    with show_progress(quiet or as_json) as progress:
        from mobilevd_deploy.tune import tune as search

        found = search(
            checkpoint_or_demo(checkpoint),
            chosen,
            output,
            progress,
            target_sqnr=target_sqnr,
            budget=budget,
            calibration=calibration or (),
            base=base,
            loras=parse_loras(lora),
        )
    if as_json:
        print_json({"recipe": str(output), **found.to_dict()})
        return
    from mobilevd_deploy.cli.tables import render_search, search_line

    print_rich(render_search(found))
    print(f"{output}: {search_line(found)}")
    given = [str(checkpoint)] if checkpoint else []
    given += [
        *(("--base", base) if base else ()),
        *(part for text in lora or () for part in ("--lora", text)),
    ]
    print("continue with:", shlex.join(["mobilevd-deploy", "export", *given, "--recipe", str(output)]))


@commands.command(
    epilog="Example: [bold]mobilevd-deploy verify build/clip-model --simulate[/]",
)
def verify(
    artifact: ArtifactFolder = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also run the context binaries on the HTP simulator.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an artifact: digests, the chips that its binaries name, and outputs of one graph against another.

    The exit code is 0 only if every check passes.
    """
    from mobilevd_deploy.verify import verify as run_checks

    opened = open_artifact(artifact)
    with show_progress(quiet or as_json) as progress:
        checks = run_checks(opened, simulate=simulate, progress=progress)
    failed = next((check for check in checks if not check.ok), None)
    if as_json:
        values = {"artifact": str(opened.root), "ok": failed is None}
        print_json(values | {"checks": [dataclasses.asdict(check) for check in checks]})
        raise typer.Exit(1 if failed else 0)
    from mobilevd_deploy.cli.tables import render_checks

    print_rich(render_checks(checks))
    if failed:
        where = f" of {failed.component}" if failed.component else ""
        raise ArtifactError(
            f"{opened.root}: {failed.what}{where}: {failed.detail}",
            next_step="export it again, or copy it again from its source",
        )


@commands.command(
    epilog="Examples: [bold]mobilevd-deploy init --preset mobilevd -o start.safetensors[/] (random weights), "
    "[bold]init --from stable-video-diffusion/ -o start.safetensors[/]",
)
def init(
    output: Annotated[
        Path, path_option("--output", "-o", help="The checkpoint to write, .safetensors or .pt.")
    ],
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            "-p",
            metavar="NAME|FILE",
            help="A preset by name, or a TOML file.",
            autocompletion=complete_preset,
            parser=expanded,
        ),
    ] = "mobilevd",
    source: Annotated[
        Path | None,
        path_option(
            "--from",
            help="Stable Video Diffusion as a folder or single file, or with --base a UNet alone.",
            show_default="random weights",
        ),
    ] = None,
    base: Base = None,
    lora: Loras = None,
    importance: Annotated[
        Path | None,
        path_option(
            help="With --from: JSON with the importance of each temporal block; the highest keep gate 1.",
            show_default="the preset's choice",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of random weights.")] = 0,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Data type of the stored weights.")
    ] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in training form to start from, with funnels, gates and all temporal blocks.

    With --from it has SVD's weights, and funnels by coupled singular initialisation: a start for finetuning.
    Without, it has random weights of realistic scale: clips are noise, but sizes, times and memory are those
    of a trained network.
    """
    if importance and not source:
        raise UsageError("--importance needs --from", next_step="add --from, or leave --importance out")
    from mobilevd_deploy.base.places import require_distinct, require_file_place

    require_distinct([output], [path for path in (source, importance) if path])
    require_file_place(output)
    import torch

    from mobilevd_deploy.config.presets import load_preset
    from mobilevd_deploy.model.checkpoint import open_checkpoint
    from mobilevd_deploy.training.initialise import compress_svd, draw_checkpoint, read_importance

    spec, kind = load_preset(preset).model, cast(torch.dtype, getattr(torch, dtype))
    output.parent.mkdir(parents=True, exist_ok=True)
    with show_progress(quiet or as_json) as progress:
        if source is None:
            draw_checkpoint(output, spec, seed=seed, dtype=kind, progress=progress)
        else:
            given = read_importance(importance) if importance else None
            opened = open_checkpoint(source, base=base, loras=parse_loras(lora), notice=progress.say)
            compress_svd(output, opened, spec, importance=given, dtype=kind, progress=progress)
    written = open_checkpoint(output)
    if as_json:
        kept = written.spec.unet.kept_temporal_blocks
        print_json(
            {"checkpoint": str(output), "parameters": written.parameters, "kept_temporal_blocks": kept}
        )
        return
    parameters, size = sum(written.parameters.values()) / 1e6, output.stat().st_size / 1e9
    print(f"{output}: {parameters:,.1f} M parameters of {written.spec.name}, {size:.2f} GB")


@commands.command(
    "train-demo",
    epilog="Example: [bold]mobilevd-deploy train-demo -o mine.safetensors[/] (under 90 minutes on 2 cores)",
)
def train_demo(
    output: Annotated[Path, path_option("--output", "-o", help="The checkpoint to write.")] = Path(
        "demo.safetensors"
    ),
    work: Annotated[
        Path | None,
        path_option(
            help="Folder of the resumable state.",
            show_default="OUTPUT with the ending .work in place of its own",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of clips and weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Train the demo checkpoint on synthetic clips. The same command resumes an interrupted run."""
    from mobilevd_deploy.base.places import require_file_place
    from mobilevd_deploy.training.train_demo import report_on_stderr
    from mobilevd_deploy.training.train_demo import train_demo as train

    report = (lambda _: None) if quiet else report_on_stderr
    require_file_place(output)
    work = work or output.with_name(f"{base_name(output)}.work")
    train(output, work=work, seed=seed, device=device, progress=report)
    print(output)
