"""`profile hub|phone|host|estimate`: measure or estimate latencies. `profile` alone is `profile hub`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from mobilevd_deploy.cli.completion import complete_artifact_or_preset
from mobilevd_deploy.cli.options import (
    ArtifactFolder,
    Components,
    Devices,
    Json,
    Quiet,
    Samples,
    Serial,
    expanded,
    fail,
    open_artifact,
    open_hub,
    path_option,
    print_json,
    print_rich,
    show_progress,
    split_names,
)
from mobilevd_deploy.errors import UsageError, VendorError

if TYPE_CHECKING:
    from mobilevd_deploy.profiling.measure import StoredProfile

ArtifactOrPreset = Annotated[
    str | None,
    typer.Argument(
        metavar="ARTIFACT|PRESET",
        parser=expanded,
        help="An exported artifact; or a preset or its TOML file, which can only be estimated.",
        show_default="the newest artifact below this folder",
        autocompletion=complete_artifact_or_preset,
    ),
]


class DefaultsToHub(TyperGroup):
    """A group that reads `profile ARGUMENTS` as `profile hub ARGUMENTS` unless a subcommand comes first."""

    DEFAULT = "hub"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the default subcommand where none is named and no help is wanted."""
        completing = ctx.resilient_parsing and not args
        if not completing and args[:1] not in [[name] for name in (*self.commands, *ctx.help_option_names)]:
            args = [self.DEFAULT, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete the subcommands, and what the default one takes."""
        default = self.commands[self.DEFAULT]
        with default.make_context(self.DEFAULT, [], parent=ctx, resilient_parsing=True) as inner:
            taker = default if incomplete.startswith("-") else default.params[0]
            found = [*super().shell_complete(ctx, incomplete), *taker.shell_complete(inner, incomplete)]
        return list({item.value: item for item in found}.values())


PANEL = "Measure"
commands = typer.Typer(
    name="profile",
    cls=DefaultsToHub,
    subcommand_metavar="[hub|phone|host|estimate] [ARGS]...",
    help="Measure or estimate the latency of an artifact: on AI Hub, on a phone, on this computer.\n\n"
    "Without a subcommand, the arguments are those of [bold]profile hub[/]. Results are stored as JSON and "
    "PNG in ARTIFACT.profiles/.",
    epilog='Examples: [bold]mobilevd-deploy profile --device "Xiaomi 14 Pro"[/], '
    "[bold]profile my-model --check -d S24[/], [bold]profile --resume[/], [bold]profile phone my-model[/], "
    '[bold]profile estimate mobilevd --device "Xiaomi 14 Pro"[/]',
)


@commands.command(
    epilog='Examples: [bold]mobilevd-deploy profile hub my-model --device "Xiaomi 14 Pro"[/], '
    "[bold]profile hub --resume[/]",
)
def hub(
    artifact: ArtifactOrPreset = None,
    device: Devices = None,
    components: Components = None,
    samples: Samples = 100,
    compile_on: Annotated[
        Literal["hub", "hub-aimet"] | None,
        typer.Option(
            help="Compile on AI Hub. hub: from the quantised ONNX graph or else the float graph; hub-aimet: "
            "from AIMET's encodings.",
            show_default="use the artifact's own context binaries",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Also run real inputs on the device and compare the outputs.")
    ] = False,
    image: Annotated[
        Path | None,
        path_option(help="With --check: the input picture.", show_default="a pattern"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run that was interrupted, or started by --no-wait.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Submit the jobs and return; --resume fetches the results.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure on a hosted Snapdragon phone through Qualcomm AI Hub. (The default subcommand.)

    Uploads and jobs are recorded beside the artifact, so an interrupted run loses nothing. Without AI Hub's
    client or a token, and for a preset, the latency is estimated instead.
    With --json one device gives an object, several give a list.
    """
    from mobilevd_deploy.profiling.hub.client import NotConfiguredError
    from mobilevd_deploy.profiling.hub.ledger import Request
    from mobilevd_deploy.profiling.hub.run import profile_on_hub, resume_command
    from mobilevd_deploy.profiling.measure import estimate_devices, estimate_preset, is_preset

    hub_only = bool(compile_on or check or image or no_wait)
    if resume and (device or components or hub_only):
        raise UsageError("--resume repeats the options of its run", next_step="leave the other options out")
    if image and not check:
        raise UsageError("--image needs --check", next_step="add --check, or leave --image out")
    if artifact is not None and is_preset(artifact) and not (hub_only or resume):
        show_profiles(estimate_preset(artifact, device or ()), as_json)
        return
    opened = open_artifact(Path(artifact) if artifact else None)
    request = Request(
        tuple(device or ()),
        split_names(components),
        samples,
        compile={"hub": "onnx", "hub-aimet": "aimet", None: None}[compile_on],
        check=check,
        image=str(image.resolve()) if image else None,
    )
    try:
        with show_progress(quiet or as_json) as progress:
            progress.say(f"profiling {opened.root}")
            outcome = profile_on_hub(
                opened, None if resume else request, open_hub(), progress, wait=not no_wait
            )
    except NotConfiguredError as error:
        if resume:
            raise
        show_profiles(estimate_devices(str(opened.root), device or (), unmeasured=error), as_json)
        return
    except KeyboardInterrupt:
        code = fail("interrupted; submitted jobs keep running", resume_command(opened), 130, as_json=as_json)
        raise SystemExit(code) from None
    if not no_wait:
        show_profiles(outcome.profiles, as_json)
    elif as_json:
        print_json(dataclasses.asdict(outcome.run))
    else:
        from mobilevd_deploy.cli.tables import render_jobs

        print_rich(render_jobs([outcome.run]))
        print(f"fetch the results with: {resume_command(opened)}")


@commands.command(
    epilog="Examples: [bold]mobilevd-deploy profile phone my-model[/], "
    "[bold]profile phone my-model --serial 3f9c2a71 --backend cpu[/]",
)
def phone(
    artifact: ArtifactFolder = None,
    serial: Serial = "",
    backend: Annotated[
        Literal["auto", "npu", "cpu"], typer.Option(help="Processor that the app runs the artifact on.")
    ] = "auto",
    components: Components = None,
    samples: Samples = 100,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure on the attached phone with the app's benchmark, over adb."""
    from mobilevd_deploy.profiling.measure import profile_on_phone

    opened = open_artifact(artifact)
    with show_progress(quiet or as_json) as progress:
        found = profile_on_phone(
            opened, serial, progress, components=split_names(components), samples=samples, backend=backend
        )
    show_profiles([found], as_json)


@commands.command(epilog="Example: [bold]mobilevd-deploy profile host my-model[/]")
def host(
    artifact: ArtifactFolder = None,
    components: Components = None,
    samples: Samples = 100,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure on this computer's CPU, to compare artifacts with each other."""
    from mobilevd_deploy.profiling.measure import profile_on_this_computer

    opened = open_artifact(artifact)
    with show_progress(quiet or as_json) as progress:
        found = profile_on_this_computer(
            opened, progress, components=split_names(components), samples=samples
        )
    show_profiles([found], as_json)


@commands.command(
    epilog='Example: [bold]mobilevd-deploy profile estimate mobilevd --device "Xiaomi 14 Pro"[/]',
)
def estimate(
    artifact: ArtifactOrPreset = None,
    device: Devices = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate the UNet's latency from its structure, and the error of the estimate. Nothing is measured."""
    from mobilevd_deploy.profiling.measure import estimate_devices

    with show_progress(quiet or as_json) as progress:
        found = estimate_devices(artifact, device or (), progress)
    show_profiles(found, as_json)


def show_profiles(profiles: Sequence[StoredProfile], as_json: bool) -> None:
    """Print profiles. Raises VendorError (with JSON: exits with its code) if a component failed."""
    if as_json:
        values = [profile.to_dict() | {"file": path} for path, profile in profiles]
        print_json(values[0] if len(values) == 1 else values)
    else:
        from mobilevd_deploy.cli.tables import render_profile

        for path, profile in profiles:
            print_rich(render_profile(profile))
            if path is not None:
                print(path)
    failed = [error for _, profile in profiles for error in profile.errors]
    if failed and as_json:
        raise typer.Exit(VendorError.exit_code)
    if failed:
        raise VendorError("; ".join(dict.fromkeys(failed)), next_step="fix this, then profile again")
