"""The command line: parse, call, print. Results on standard output, progress and errors on standard error.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a vendor's tool failed, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mobilevd_deploy import __version__
from mobilevd_deploy.errors import ArtifactError, MobileVDError, UsageError, VendorError

if TYPE_CHECKING:
    from mobilevd_deploy.artifact import Artifact
    from mobilevd_deploy.hub import Hub, Run
    from mobilevd_deploy.profiles import Profile
    from mobilevd_deploy.progress import Progress

app = typer.Typer(
    name="mobilevd-deploy",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take a trained MobileVD checkpoint to a Snapdragon phone.",
    epilog="Example: [bold]mobilevd-deploy export ckpt.pt -o clip-model[/] and then "
    "[bold]mobilevd-deploy generate photo.jpg --artifact clip-model -o clip.gif[/]",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(
    epilog="Example: [bold]mobilevd-deploy export ckpt.pt --recipe npu-float -o build/clip-model[/]",
)
def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A .pt or .safetensors checkpoint, or a diffusers folder of Stable Video Diffusion. "
            "Left out: the demo that comes with the package.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="A shipped recipe by name, or a TOML file of your own.")
    ] = "xiaomi-14-pro",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The artifact's folder. [default: CHECKPOINT-RECIPE here]",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            "-c",
            help="Pictures, or folders of them, to calibrate the quantisation. [default: drawn ones]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", help="Chip to compile for, SM8650; several may be named. [default: the recipe's]"
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut the UNet into this many context binaries. [default: as few as stay below 2 GiB]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rewrite, verify and export a checkpoint; the artifact is a folder that holds all that a runner needs.

    Interrupted at any moment, the same command goes on at the last finished stage.
    """
    from mobilevd_deploy.data import data_dir
    from mobilevd_deploy.recipe import load_recipe

    chosen = load_recipe(recipe)
    if target or parts:
        if chosen.npu is None:
            raise UsageError(
                f"recipe {chosen.name} compiles for no chip", next_step="choose a recipe with [npu]"
            )
        targets = tuple(dict.fromkeys(target or chosen.npu.targets))
        npu = dataclasses.replace(chosen.npu, targets=targets, parts=parts or chosen.npu.parts)
        chosen = dataclasses.replace(chosen, npu=npu)
    checkpoint = checkpoint or data_dir("models") / "demo.safetensors"
    output = output or Path(f"{checkpoint.resolve().stem}-{chosen.name}")
    with _progress(quiet or as_json) as progress:
        progress.say(f"{checkpoint.name} -> {output} by recipe {chosen.name}")
        from mobilevd_deploy.deploy import deploy

        artifact = deploy(checkpoint, chosen, output, progress, calibration=calibration or ())
    manifest = artifact.manifest
    if as_json:
        _print_json({"artifact": str(artifact.root), **json.loads(manifest.to_json())})
        return
    drifts = [value for value in manifest.drift["onnx"].values() if value is not None]
    worst = f"{min(drifts):.0f} dB" if drifts else "identical"
    parameters = sum(c.parameters for c in manifest.components) / 1e6
    tflops = sum(c.flops for c in manifest.components) / 1e12
    print(f"{artifact.root}: {artifact.bytes / 1e6:.1f} MB, {parameters:.1f} M parameters,", end=" ")
    print(f"{tflops:.3g} TFLOPs a clip, {worst} from the trained network")
    if manifest.quality is not None:
        quantised = min(value for value in manifest.drift["quantised"].values() if value is not None)
        print(f"quantised: worst component {quantised:.1f} dB", end=", ")
        print(f"clip {_number(manifest.quality.clip_psnr_db)} dB PSNR from the float clip")
    for binary in manifest.components[-1].npu:
        size = sum(b.bytes for c in manifest.components for b in c.npu if b.target == binary.target)
        print(f"{binary.target}: {binary.precision} context binaries, {size / 1e6:.1f} MB", end="")
        simulated = [v for v in manifest.drift.get(f"npu.{binary.target}", {}).values() if v is not None]
        print(f", on the simulator {min(simulated):.1f} dB at worst" if simulated else ", not simulated")
    print(f"look at {artifact.root / 'report.html'}")


@app.command(
    epilog="Example: [bold]mobilevd-deploy tune ckpt.pt --target-sqnr 28 -o my.toml[/] and then "
    "[bold]mobilevd-deploy export ckpt.pt --recipe my.toml[/]",
)
def tune(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="As for export. Left out: the demo.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write, a TOML file.")] = Path(
        "tuned.toml"
    ),
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="What to begin with: all of it but the UNet's bits stays.")
    ] = "xiaomi-14-pro",
    target_sqnr: Annotated[
        float | None,
        typer.Option(
            help="The UNet's SQNR against float in dB, which is reached as cheaply as can be found.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Bit operations of the UNet, 1 for W8A16 throughout, about 0.5 for W8A8: the best is found "
            "that costs no more.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option("--calibration", "-c", help="As for export, which needs the same.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search which blocks of the UNet do with 8-bit activations and which need more bits, and write a recipe.

    What was measured stays in OUTPUT.work: interrupted at any moment, the same command goes on, and another
    goal begins with what is known.
    """
    from rich.table import Table

    from mobilevd_deploy.data import data_dir
    from mobilevd_deploy.recipe import load_recipe

    chosen = load_recipe(recipe)
    with _progress(quiet or as_json) as progress:
        from mobilevd_deploy.tune import tune as search

        found = search(
            checkpoint or data_dir("models") / "demo.safetensors",
            chosen,
            output,
            progress,
            target_sqnr=target_sqnr,
            budget=budget,
            calibration=calibration or (),
        )
    if as_json:
        _print_json({"recipe": str(output), **found.to_dict()})
        return
    table = Table("bit operations", "predicted, dB", "simulated, dB", "changed")
    for step in found.steps:
        changed = f"{step.block} to w{step.weights}a{step.activations}" if step.block else "w8a8 throughout"
        figures = (_number(math.inf if db is None else db) for db in (step.predicted_db, step.measured_db))
        table.add_row(f"{step.bit_operations:.3f}", *figures, changed)
    _print_rich(table)
    counts = Counter(f"w{weights}a{activations}" for weights, activations in found.bits.values())
    blocks = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
    print(
        f"{output}: {found.sqnr_db:.1f} dB at {found.bit_operations:.2f} of W8A16's bit operations; {blocks}"
    )
    print(f"go on with: mobilevd-deploy export {checkpoint or ''} --recipe {output}".replace("  ", " "))


@app.command(
    epilog="Example: [bold]mobilevd-deploy generate photo.jpg -a build/clip-model -o clip.mp4 --seed 7[/]",
)
def generate(
    image: Annotated[
        Path, typer.Argument(help="Any picture; it is scaled and cropped to fit.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="clip.gif, clip.mp4, or sheet.png.")] = Path(
        "clip.gif"
    ),
    artifact: Annotated[
        Path | None,
        typer.Option(
            "--artifact", "-a", help="An exported artifact. [default: the newest here]", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="The same seed gives the same clip everywhere.")
    ] = 0,
    frames_dir: Annotated[
        Path | None, typer.Option(help="Also write every frame as PNG into this folder.", show_default=False)
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write input and frames side by side as PNG.", show_default=False)
    ] = None,
    scale: Annotated[int, typer.Option(min=1, max=16, help="Enlarge the clip by this factor.")] = 1,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider",
            "-p",
            help="onnxruntime execution provider, best first; or npu-sim: the context binaries on the HTP "
            "simulator; or quantised: the quantised graphs on the CPU. [default: CPU]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a moving clip from one picture with an exported artifact."""
    from mobilevd_deploy import media
    from mobilevd_deploy.artifact import Artifact, find_newest
    from mobilevd_deploy.pipeline import Pipeline

    media.check_clip_path(output)
    if sheet:
        media.check_sheet_path(sheet)
    if frames_dir:
        media.check_frames_folder(frames_dir)
    opened = Artifact.open(artifact) if artifact else find_newest(Path(), advice="name one with --artifact")
    spec = opened.manifest.pipeline
    picture = media.read_picture(image, spec.width, spec.height)
    with _progress(quiet or as_json) as progress:
        progress.say(picture.done)
        pipeline = Pipeline.open(opened, tuple(provider) if provider else ("CPUExecutionProvider",))
        frames = media.enlarge(pipeline.generate(picture.pixels, seed, progress), scale)
    media.write_clip(frames, output, spec.fps)
    written = [output]
    if frames_dir:
        written += media.write_frames(frames, frames_dir)
    if sheet:
        first, clip = media.to_uint8(media.enlarge(picture.pixels, scale)), media.to_uint8(frames)
        # Two rows of frames: fourteen pictures side by side fit no screen.
        half = (len(clip) + 1) // 2
        rows = [("input", first), (f"{output.name}, seed {seed}", clip[:half])]
        media.write_sheet(rows + [("", clip[half:])] * (half < len(clip)), sheet)
        written.append(sheet)
    if as_json:
        _print_json(
            {
                "artifact": str(opened.root),
                "clip": str(output),
                "written": [str(path) for path in written],
                "picture": picture.done,
                "seed": seed,
                "frames": spec.frames,
                "fps": spec.fps,
            }
        )
        return
    size = f"{spec.width * scale}x{spec.height * scale}"
    print(f"{output}: {spec.frames} frames of {size} at {spec.fps} fps, seed {seed}")


@app.command(
    epilog="Example: [bold]mobilevd-deploy verify build/clip-model --simulate[/]",
)
def verify(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="An exported artifact. [default: the newest here]", show_default=False),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also run the context binaries on the HTP simulator.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an artifact: digests, the chips its binaries name, outputs graph against graph.

    Exit code 0 only if everything holds.
    """
    from rich.table import Table

    from mobilevd_deploy.artifact import Artifact, find_newest
    from mobilevd_deploy.verify import verify as look

    opened = Artifact.open(artifact) if artifact else find_newest(Path())
    with _progress(quiet or as_json) as progress:
        checks = look(opened, simulate=simulate, progress=progress)
    failed = [check for check in checks if not check.ok]
    if as_json:
        values = {"artifact": str(opened.root), "ok": not failed}
        _print_json(values | {"checks": [dataclasses.asdict(check) for check in checks]})
        sys.exit(1 if failed else 0)
    table = Table("", "check", "component", "")
    for check in checks:
        table.add_row("ok" if check.ok else "FAILED", check.what, check.component or "", check.detail)
    _print_rich(table)
    if failed:
        where = f" of {failed[0].component}" if failed[0].component else ""
        raise ArtifactError(
            f"{opened.root}: {failed[0].what}{where}: {failed[0].detail}",
            next_step="export it again, or copy it again from where it came",
        )


@app.command(
    epilog="Examples: [bold]mobilevd-deploy traffic build/clip-model[/], "
    "[bold]traffic mobilevd --blocks 'down_blocks.0.*' --recipe npu-float --mode 3[/]",
)
def traffic(
    what: Annotated[
        str,
        typer.Argument(help="An artifact with context binaries, or a preset by name.", show_default=False),
    ],
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a preset: which blocks, with shell wildcards. [default: all]", show_default=False
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="Of a preset: graph forms and bits.")
    ] = "xiaomi-14-pro",
    mode: Annotated[
        int | None, typer.Option(min=0, max=3, help="Another optimisation mode than the recipe's.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it into this PNG file.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count the bytes that move to and from DRAM, by the compiler's own schedule: planned, not measured.

    A preset is compiled block by block with random weights, because no schedule depends on their values. What
    was counted of an artifact is kept in ARTIFACT.profiles/.
    """
    from rich.table import Table

    from mobilevd_deploy.artifact import MANIFEST, Artifact
    from mobilevd_deploy.profiles import profiles_dir, save_traffic
    from mobilevd_deploy.recipe import load_recipe
    from mobilevd_deploy.spec import load_preset
    from mobilevd_deploy.traffic import measure_artifact, measure_preset, write_picture

    if picture is not None and picture.suffix != ".png":
        raise UsageError(f"{picture} is not a PNG file", next_step="name it like traffic.png")
    with _progress(quiet or as_json) as progress:
        if (Path(what) / MANIFEST).exists():
            artifact = Artifact.open(what)
            report = measure_artifact(artifact, progress)
            save_traffic(report, profiles_dir(artifact))
        else:
            chosen, wanted = load_recipe(recipe), tuple(blocks or ["*"])
            report = measure_preset(what, load_preset(what).model, chosen, wanted, mode, progress)
    if picture is not None:
        write_picture(report, picture)
    if as_json:
        _print_json(report.to_dict() | {"read": report.read, "written": report.written})
        return
    title = (
        f"DRAM traffic as scheduled: {report.precision} for {report.target}, mode {report.optimization_mode}"
    )
    table = Table("module", "read, MB", "written, MB", "floor, MB", "", title=title)
    most = max(row.read + row.written for row in report.rows)
    for row in report.rows:
        for shown, indent in ((row, ""), *((part, "  ") for part in row.parts)):
            bar = "█" * round(30 * (shown.read + shown.written) / most) if most else ""
            floor = "" if shown.floor is None else f"{shown.floor / 1e6:,.1f}"
            name, read, written = indent + shown.path, shown.read / 1e6, shown.written / 1e6
            table.add_row(name, f"{read:,.1f}", f"{written:,.1f}", floor, bar)
    table.add_section()
    table.add_row("in sum", f"{report.read / 1e6:,.1f}", f"{report.written / 1e6:,.1f}")
    _print_rich(table)
    for row in report.rows:
        if row.note is not None:
            _print_rich(f"{row.path}: {row.note}")


@app.command(
    epilog="Examples: [bold]mobilevd-deploy inspect ckpt.pt[/], [bold]inspect mobilevd[/], "
    "[bold]inspect --ladder --json[/]",
)
def inspect(
    what: Annotated[
        str | None, typer.Argument(help="A checkpoint, preset or artifact.", show_default=False)
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="The published ablation beside ours, all presets.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show structure, blocks kept and dropped, funnels, parameters and FLOPs."""
    if (what is None) == (not ladder):
        raise UsageError("name one thing to inspect, or --ladder", next_step="mobilevd-deploy inspect --help")
    from mobilevd_deploy import inspection

    result: Any
    if ladder:
        with _progress(as_json) as progress:
            result = inspection.ladder(progress)
        shown = inspection.render_ladder(result)
    else:
        assert what is not None
        result = inspection.inspect(what)
        shown = inspection.render_inspection(result)
    if as_json:
        _print_json(result)
        return
    _print_rich(shown)


@app.command(epilog="Example: [bold]mobilevd-deploy diff build/clip-model build/clip-model-npu[/]")
def diff(
    a: Annotated[Path, typer.Argument(help="An artifact.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    all_rows: Annotated[bool, typer.Option("--all", help="Equal quantities too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare two artifacts: size, parameters, FLOPs, op counts, drift, and the newest profiles of both."""
    from mobilevd_deploy.artifact import Artifact
    from mobilevd_deploy.artifact import diff as compare
    from mobilevd_deploy.profiles import diff_profiles

    before, after = Artifact.open(a), Artifact.open(b)
    rows = (*compare(before, after), *diff_profiles(before, after))
    if as_json:
        # JSON has no infinity; a drift of inf means identical outputs.
        shown: dict[float | None, Any] = {math.inf: "identical"}
        _print_json(
            [
                vars(r) | {"a": shown.get(r.a, r.a), "b": shown.get(r.b, r.b), "equal": r.a == r.b}
                for r in rows
            ]
        )
        return
    from rich.table import Table

    table = Table("component", "quantity", str(a), str(b), "change", title_justify="left")
    for row in rows:
        if all_rows or row.a != row.b:
            sides = (_number(row.a, row.a_error_percent), _number(row.b, row.b_error_percent))
            table.add_row(row.component or "whole", row.quantity, *sides, _change(row.a, row.b))
    _print_rich(table if table.row_count else "no difference in size, parameters, FLOPs, ops, drift or time")


@app.command(
    epilog='Examples: [bold]mobilevd-deploy profile --device "Xiaomi 14 Pro"[/], [bold]profile --resume[/], '
    '[bold]profile my-model --adb[/], [bold]profile mobilevd --estimate --device "Xiaomi 14 Pro"[/]',
)
def profile(
    artifact: Annotated[
        str | None,
        typer.Argument(
            help="An exported artifact; a preset, or its TOML file, is estimated. "
            "[default: the newest artifact here]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", "-d", help="A phone or chip by name; may be repeated.", show_default=False),
    ] = None,
    components: Annotated[
        str | None, typer.Option(help="Only these, separated by commas. [default: all]", show_default=False)
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, max=10_000, help="Calls that are timed on the device.")
    ] = 100,
    compile_on: Annotated[
        Literal["hub", "hub-aimet"] | None,
        typer.Option(
            help="hub: its compiler makes the binaries, from the quantised ONNX graph or the float one; "
            "hub-aimet: from AIMET's encodings. [default: the artifact's own context binaries]",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also run it on the device on real inputs, and compare.")
    ] = False,
    image: Annotated[
        Path | None, typer.Option(help="The check's picture. [default: a pattern]", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was interrupted, or not waited for.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Submit, and leave the waiting to --resume.")
    ] = False,
    adb: Annotated[
        str | None,
        typer.Option(
            "--adb",
            metavar="[SERIAL]",
            help="On the attached phone, by the app's benchmark; the serial number where there are several.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        Literal["auto", "npu", "cpu"], typer.Option(help="With --adb: where the app is to run it.")
    ] = "auto",
    host: Annotated[
        bool, typer.Option("--host", help="On this computer's CPU, to compare artifacts with each other.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure nothing: estimate, with the error beside it.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure an artifact: on a hosted Snapdragon through Qualcomm AI Hub, or on a phone on the desk (--adb).

    What was uploaded or submitted is written down beside the artifact, so an interrupted run loses nothing.
    Without the hub's client or a token for it, the latency is estimated.
    With --json one device gives an object, several give a list.
    """
    from mobilevd_deploy.artifact import Artifact, find_newest
    from mobilevd_deploy.spec import preset_names

    hub_only = bool(compile_on or check or image or no_wait)
    if resume and (device or components or hub_only or estimate or host or adb is not None):
        raise UsageError("--resume goes on with what was asked for", next_step="leave the other options out")
    if image and not check:
        raise UsageError("--image is the picture of --check", next_step="add --check, or leave --image out")
    if (adb is not None) + host + estimate > 1:
        raise UsageError("--adb, --host and --estimate are three ways", next_step="choose one")
    if backend != "auto" and adb is None:
        raise UsageError("--backend is for the app on a phone", next_step="add --adb, or leave it out")
    if estimate and (components or hub_only):
        raise UsageError("--estimate runs nothing on a device", next_step="leave the other options out")
    if (host or adb is not None) and (device or hub_only):
        raise UsageError(
            "--device, --compile-on, --check and --no-wait are AI Hub's", next_step="leave them out"
        )
    if estimate:
        with _progress(quiet or as_json) as progress:
            found = _estimate(artifact, device, progress)
        _show_profiles(found, as_json)
        return
    is_preset = artifact is not None and (artifact in preset_names() or Path(artifact).suffix == ".toml")
    if is_preset and not (hub_only or resume or host or adb is not None):
        unmeasured = VendorError(
            f"{artifact} is a preset",
            next_step="mobilevd-deploy export makes an artifact of a checkpoint, which profile measures: "
            "through AI Hub with a token (qai-hub configure --api_token TOKEN), or on a phone with --adb",
        )
        _show_profiles(_estimate(artifact, device, unmeasured=unmeasured), as_json)
        return
    names = tuple(name.strip() for name in components.split(",")) if components else ()
    opened = Artifact.open(artifact) if artifact else find_newest(Path())
    if host or adb is not None:
        _show_profiles([_profile_here(opened, adb, names, samples, backend, quiet or as_json)], as_json)
        return
    from mobilevd_deploy import hub

    request = hub.Request(
        tuple(device or ()),
        names,
        samples,
        compile={"hub": "onnx", "hub-aimet": "aimet", None: None}[compile_on],
        check=check,
        image=str(image.resolve()) if image else None,
    )
    try:
        with _progress(quiet or as_json) as progress:
            progress.say(f"profiling {opened.root}")
            outcome = hub.profile_on_hub(
                opened,
                None if resume else request,
                _open_hub(),
                progress,
                wait=not no_wait,
            )
    except hub.NotConfiguredError as error:
        if resume:
            raise
        _show_profiles(_estimate(str(opened.root), device, unmeasured=error), as_json)
        return
    except KeyboardInterrupt:
        go_on = hub.resume_command(opened)
        _fail("interrupted; jobs that were submitted go on without us", go_on, 130, as_json)
        return
    if not no_wait:
        _show_profiles(outcome.profiles, as_json)
    elif as_json:
        _print_json(dataclasses.asdict(outcome.run))
    else:
        _print_rich(_job_table([outcome.run]))
        print(f"fetch the results with: {hub.resume_command(opened)}")


@app.command(epilog="Example: [bold]mobilevd-deploy report build/clip-model[/]")
def report(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="An exported artifact. [default: the newest here]", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was measured and estimated of an artifact, the newest of each kind beside each other.

    Also written as a page, ARTIFACT.profiles/report.html. What the export did stands in the artifact's own.
    """
    from mobilevd_deploy.artifact import Artifact, find_newest
    from mobilevd_deploy.profiles import (
        load_traffic,
        newest_profiles,
        profiles_dir,
        render_comparison,
        write_durably,
    )
    from mobilevd_deploy.report.profiles_page import render_profiles

    opened = Artifact.open(artifact) if artifact else find_newest(Path())
    profiles, traffic = newest_profiles(opened), load_traffic(opened)
    if not (profiles or traffic):
        raise UsageError(
            f"{opened.root}: nothing was measured or estimated of it yet",
            next_step=f"mobilevd-deploy profile {opened.root} --device NAME, --adb, --host or --estimate; "
            f"or mobilevd-deploy traffic {opened.root}",
        )
    page = profiles_dir(opened) / "report.html"
    write_durably(page, render_profiles(opened.manifest.name, profiles, traffic))
    if as_json:
        values = {"page": page, "profiles": [profile.to_dict() for profile in profiles]}
        _print_json(values | {"traffic": [report.to_dict() for report in traffic]})
        return
    if profiles:
        _print_rich(render_comparison(profiles))
    for planned in traffic:
        read, written = planned.read / 1e6, planned.written / 1e6
        print(f"DRAM traffic planned for {planned.target}: {read:,.1f} MB read, {written:,.1f} MB written")
    print(f"look at {page}, and at {opened.root / 'report.html'}")


@app.command(epilog="Example: [bold]mobilevd-deploy install build/clip-model --adb 3f9c2a71[/]")
def install(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="An exported artifact. [default: the newest here]", show_default=False),
    ] = None,
    adb: Annotated[
        str, typer.Option("--adb", metavar="SERIAL", help="Which phone, where several are attached.")
    ] = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put an artifact into the app on the attached phone; every byte is checked there."""
    from mobilevd_deploy.adb import ARTIFACTS, Adb
    from mobilevd_deploy.adb import install as put
    from mobilevd_deploy.artifact import Artifact, find_newest

    opened = Artifact.open(artifact) if artifact else find_newest(Path())
    with _progress(quiet or as_json) as progress:
        phone = Adb.open(adb)
        name = put(opened, phone, progress)
    if as_json:
        _print_json({"artifact": str(opened.root), "serial": phone.serial, "path": f"{ARTIFACTS}/{name}"})
        return
    print(f"{name} is on {phone.serial}: open the app, or mobilevd-deploy profile {opened.root} --adb")


@app.command(epilog="Example: [bold]mobilevd-deploy pack build/clip-model -o clip-model.mvd[/]")
def pack(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="An exported artifact. [default: the newest here]", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file. [default: ARTIFACT.mvd here]", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an artifact as one file, which the app opens from wherever a phone keeps files."""
    from mobilevd_deploy.artifact import Artifact, find_newest
    from mobilevd_deploy.pack import SUFFIX
    from mobilevd_deploy.pack import pack as write

    opened = Artifact.open(artifact) if artifact else find_newest(Path())
    with _progress(quiet or as_json) as progress:
        written = write(opened, output or Path(f"{opened.root.resolve().name}{SUFFIX}"), progress)
    size = written.stat().st_size
    if as_json:
        _print_json({"artifact": str(opened.root), "file": str(written), "bytes": size})
        return
    print(f"{written}: {size / 1e6:,.1f} MB; send it to the phone, and open it with the app")


@app.command(epilog="Examples: [bold]mobilevd-deploy doctor mobilevd[/], [bold]doctor --recipe onnx[/]")
def doctor(
    model: Annotated[
        str, typer.Argument(help="A preset or TOML file: memory and disk are held against its size.")
    ] = "demo",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="What it is to be exported by.")
    ] = "xiaomi-14-pro",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what of this computer is ready, and how to make ready what is not.

    Exit code 0 if everything is there that the recipe needs. AI Hub, a phone and the tools for the app are
    for those who want them, and do not count.
    """
    from mobilevd_deploy.doctor import examine
    from mobilevd_deploy.recipe import load_recipe
    from mobilevd_deploy.spec import load_preset

    chosen, spec = load_recipe(recipe), load_preset(model).model
    with _progress(quiet or as_json) as progress:
        findings = examine(chosen, spec, Path(), progress)
    ready = all(finding.ready for finding in findings if finding.needed)
    if as_json:
        values = {"ready": ready, "recipe": chosen.name, "model": spec.name}
        _print_json(values | {"findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            mark = "ok     " if finding.ready else "MISSING" if finding.needed else "not yet"
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            print(f"{mark} {finding.what}: {finding.detail}{remedy}")
    sys.exit(0 if ready else 1)


@app.command(epilog="Example: [bold]mobilevd-deploy jobs build/clip-model[/]")
def jobs(
    artifact: Annotated[
        Path | None,
        typer.Argument(help="An exported artifact. [default: the newest here]", show_default=False),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="As last written down; ask the hub nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the jobs that `profile` submitted for an artifact, and how they stand."""
    from mobilevd_deploy import hub
    from mobilevd_deploy.artifact import Artifact, find_newest

    opened = Artifact.open(artifact) if artifact else find_newest(Path())
    runs = hub.refresh_jobs(opened, None if offline else _open_hub())
    if as_json:
        _print_json([dataclasses.asdict(run) for run in runs])
        return
    _print_rich(_job_table(runs) if runs else f"{opened.root}: no jobs were submitted")


@app.command(epilog='Examples: [bold]mobilevd-deploy devices "Xiaomi 14 Pro"[/], [bold]devices --hub[/]')
def devices(
    name: Annotated[
        str | None, typer.Argument(help="A phone or chip: only phones with its chip.", show_default=False)
    ] = None,
    from_hub: Annotated[bool, typer.Option("--hub", help="Ask AI Hub what it hosts now.")] = False,
    as_json: Json = False,
) -> None:
    """List phones, their chips and HTP versions, and on which hosted phone each is profiled."""
    from mobilevd_deploy.devices import find, list_devices, render_devices

    chip = find(name).chip.name if name else None
    hosted = _open_hub().devices() if from_hub else None
    rows = [row for row in list_devices(hosted) if chip in (None, row["chipset"])]
    if as_json:
        _print_json(rows)
        return
    _print_rich(render_devices(rows, live=from_hub))


@app.command(
    epilog="Examples: [bold]mobilevd-deploy init --preset mobilevd -o start.safetensors[/] (random weights), "
    "[bold]init --from stable-video-diffusion/ -o start.safetensors[/]",
)
def init(
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint, .safetensors or .pt.")],
    preset: Annotated[
        str, typer.Option("--preset", "-p", help="A preset by name, or a TOML file.")
    ] = "mobilevd",
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A diffusers folder of Stable Video Diffusion. [default: random weights]",
            show_default=False,
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            help="With --from: JSON of temporal blocks and their importance; the highest keep a gate of 1. "
            "[default: the preset's choice]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of random weights.")] = 0,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the stored weights.")
    ] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in training form to begin from: funnels, gates and all temporal blocks in place.

    With --from it holds SVD's weights, funnels by coupled singular initialisation, to be finetuned. Without,
    random ones of realistic scales: a clip of noise, but sizes, times and memory of a trained network.
    """
    import torch

    from mobilevd_deploy.checkpoint import open_checkpoint
    from mobilevd_deploy.spec import load_preset
    from mobilevd_deploy.training import initialise

    if importance and not source:
        raise UsageError("--importance goes with --from", next_step="leave it out, or name SVD's folder")
    spec, kind = load_preset(preset).model, cast(torch.dtype, getattr(torch, dtype))
    with _progress(quiet or as_json) as progress:
        if source is None:
            initialise.draw_checkpoint(output, spec, seed=seed, dtype=kind, progress=progress)
        else:
            given = initialise.read_importance(importance) if importance else None
            spec = initialise.compress_svd(
                output, open_checkpoint(source), spec, importance=given, dtype=kind, progress=progress
            )
    written = open_checkpoint(output)
    parameters = written.parameters
    if as_json:
        kept = written.spec.unet.kept_temporal_blocks
        _print_json({"checkpoint": str(output), "parameters": parameters, "kept_temporal_blocks": kept})
        return
    size = output.stat().st_size / 1e9
    print(f"{output}: {sum(parameters.values()) / 1e6:,.1f} M parameters of {spec.name}, {size:.2f} GB")


@app.command(
    "train-demo",
    epilog="Example: [bold]mobilevd-deploy train-demo -o mine.safetensors[/] (under 90 minutes on 2 cores)",
)
def train_demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The checkpoint to write.")] = Path(
        "demo.safetensors"
    ),
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of the resumable state. [default: OUTPUT.work]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of clips and weights.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Train the demo checkpoint on synthetic clips; an interrupted run goes on where it was."""
    from mobilevd_deploy.training.train_demo import report_on_stderr
    from mobilevd_deploy.training.train_demo import train_demo as train

    report = (lambda _: None) if quiet else report_on_stderr
    train(output, work=work or output.with_suffix(".work"), seed=seed, device=device, progress=report)
    print(output)


def main() -> None:
    """Run the command line; every error of ours becomes a sentence and an exit code."""
    as_json = "--json" in sys.argv
    try:
        code = app(_with_serial(sys.argv[1:]), standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()  # here, where a reader that went away is noticed
        sys.exit(code)
    except MobileVDError as error:
        _fail(error.what, error.next_step, error.exit_code, as_json)
    except typer.TyperException as error:
        usage = cast(Any, error)
        if as_json:
            _fail(usage.format_message(), "the same with --help shows how", 2, as_json)
        usage.show()  # what and where, as typer puts it
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", "run the same command again to go on", 130, as_json)
    except BrokenPipeError:
        # Python flushes once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a path that the system refuses where nobody expected it
        _fail(str(error), "check the path and its permissions", 1, as_json)
    except MemoryError:
        _fail("not enough memory", "close other programs, or use a machine with more", 1, as_json)


def _with_serial(arguments: Sequence[str]) -> list[str]:
    """Give `--adb` an empty value where it has none, because typer knows no optional ones."""
    filled: list[str] = []
    for word, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        filled.append(word)
        if word == "--adb" and (following.startswith("-") or Path(following).is_dir()):
            filled.append("")
    return filled


def _fail(what: str, next_step: str | None, code: int, as_json: bool) -> None:
    if as_json:
        _print_json({"error": what, "next_step": next_step, "exit_code": code})
    print(f"error: {what}", file=sys.stderr)
    if next_step:
        print(f" next: {next_step}", file=sys.stderr)
    sys.exit(code)


def _progress(quiet: bool) -> Progress:
    from mobilevd_deploy.progress import make_progress

    return make_progress(quiet=quiet)


def _open_hub() -> Hub:
    """Open the hub's client; that others can read the token is said however quiet the rest is to be."""
    from mobilevd_deploy.hub import Hub

    opened = Hub.open()
    if opened.exposed:
        print(f"warning: {': '.join(opened.exposed)}", file=sys.stderr)
    return opened


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, default=str, allow_nan=False))


def _print_rich(renderable: Any) -> None:
    from rich.console import Console

    # Rich wraps to 80 columns where nobody looks; a log or a file deserves the whole table.
    Console(width=None if sys.stdout.isatty() else 160).print(renderable)


def _estimate(
    artifact: str | None,
    devices: list[str] | None,
    progress: Progress | None = None,
    unmeasured: VendorError | None = None,
) -> list[tuple[Path | None, Profile]]:
    """Estimate on every device; of an artifact it is stored. `unmeasured`: why nothing could be measured."""
    from mobilevd_deploy.artifact import MANIFEST, Artifact, find_newest
    from mobilevd_deploy.devices import find
    from mobilevd_deploy.estimate import estimate_profile
    from mobilevd_deploy.profiles import profiles_dir, save_profile

    if not devices:
        raise UsageError("no device is named", next_step='for example --device "Xiaomi 14 Pro"')
    for device in devices:
        find(device)  # a misspelt name is the first thing to mend, whatever else is missing
    what: Artifact | str
    if artifact is None:
        what = find_newest(Path(), advice="name one, or a preset such as mobilevd, as the argument")
        if progress:
            progress.say(f"estimating {what.root}")
    else:
        what = Artifact.open(artifact) if (Path(artifact) / MANIFEST).exists() else artifact
    found: list[tuple[Path | None, Profile]] = []
    for device in devices:
        try:
            profile = estimate_profile(what, device)
        except UsageError as error:
            if unmeasured is None:
                raise
            reasons = f"{unmeasured.what}, and there is no estimate: {error.what}"
            raise VendorError(reasons, next_step=f"{unmeasured.next_step}; {error.next_step}") from error
        if unmeasured is not None:
            note = f"nothing was measured: {unmeasured.what}; {unmeasured.next_step}"
            profile = dataclasses.replace(profile, notes=(note, *profile.notes))
        path = save_profile(profile, profiles_dir(what)) if isinstance(what, Artifact) else None
        found.append((path, profile))
    return found


def _profile_here(
    artifact: Artifact,
    adb: str | None,
    components: tuple[str, ...],
    samples: int,
    backend: Literal["auto", "npu", "cpu"],
    quiet: bool,
) -> tuple[Path, Profile]:
    """Measure on the phone on the desk or, where `adb` is None, on this computer; and store it."""
    from mobilevd_deploy.profiles import profiles_dir, save_profile

    with _progress(quiet) as progress:
        progress.say(f"profiling {artifact.root}")
        if adb is None:
            from mobilevd_deploy.host import profile_on_host

            found = profile_on_host(artifact, progress, components=components, samples=samples)
        else:
            from mobilevd_deploy.adb import Adb, profile_over_adb

            found = profile_over_adb(
                artifact,
                Adb.open(adb),
                progress,
                asked_for=adb or "attached phone",
                components=components,
                samples=samples,
                backend=backend,
            )
    return save_profile(found, profiles_dir(artifact)), found


def _show_profiles(profiles: Sequence[tuple[Path | None, Profile]], as_json: bool) -> None:
    """Print profiles; what failed in them decides the exit code."""
    from mobilevd_deploy.profiles import render_profile

    if as_json:
        values = [profile.to_dict() | {"file": path} for path, profile in profiles]
        _print_json(values[0] if len(values) == 1 else values)
    else:
        for path, profile in profiles:
            _print_rich(render_profile(profile))
            if path is not None:
                print(path)
    failed = [error for _, profile in profiles for error in profile.errors]
    if failed and as_json:
        sys.exit(VendorError.exit_code)
    if failed:
        raise VendorError("; ".join(dict.fromkeys(failed)), next_step="profile again once that is mended")


def _job_table(runs: Sequence[Run]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("run", "component", "job", "device", "state", "id", "page")
    for run in runs:
        for job in run.jobs:
            state = job.state if job.reason is None else f"{job.state}: {job.reason}"
            cells = (run.begun, job.component, job.kind, job.device, state, job.id, job.url)
            table.add_row(*map(Text, cells))
    return table


def _number(value: float | None, error_percent: float | None = None) -> str:
    if value is None or value == math.inf:
        return "-" if value is None else "identical"
    spread = "" if error_percent is None else f" ± {error_percent:.0f} %"
    return (f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}") + spread


def _change(a: float | None, b: float | None) -> str:
    return f"{b / a - 1:+.1%}" if a and b and a < math.inf and b < math.inf else ""


if __name__ == "__main__":
    main()
