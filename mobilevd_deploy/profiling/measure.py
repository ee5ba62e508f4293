"""Measure an artifact on a phone or on this computer, or estimate it, and store the profile beside it.

`profile_on_hub` is not here: its jobs outlive the process, so it stores its profiles itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mobilevd_deploy.artifact.artifact import Artifact, find_newest
from mobilevd_deploy.artifact.manifest import MANIFEST
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.devices import find
from mobilevd_deploy.config.presets import preset_names
from mobilevd_deploy.errors import UsageError, VendorError
from mobilevd_deploy.profiling.profile import Profile
from mobilevd_deploy.profiling.store import profiles_dir, save_profile

StoredProfile = tuple[Path | None, Profile]
"""A profile and its file; None for a preset, which has no folder of profiles."""


def profile_on_this_computer(
    artifact: Artifact, progress: Progress, *, components: tuple[str, ...] = (), samples: int = 100
) -> StoredProfile:
    """Measure on this computer's CPU. Arguments and errors as in `profile_on_host`."""
    from mobilevd_deploy.profiling.host import profile_on_host

    progress.say(f"profiling {artifact.root}")
    found = profile_on_host(artifact, progress, components=components, samples=samples)
    return save_profile(found, profiles_dir(artifact)), found


def profile_on_phone(
    artifact: Artifact,
    serial: str,
    progress: Progress,
    *,
    components: tuple[str, ...] = (),
    samples: int = 100,
    backend: Literal["auto", "npu", "cpu"] = "auto",
) -> StoredProfile:
    """Measure on the attached phone `serial`, or on the only one if it is empty.

    The other arguments and the errors are those of `profile_over_adb` and `Adb.open`.
    """
    from mobilevd_deploy.profiling.phone.adb import Adb
    from mobilevd_deploy.profiling.phone.run import profile_over_adb

    progress.say(f"profiling {artifact.root}")
    found = profile_over_adb(
        artifact,
        Adb.open(serial),
        progress,
        asked_for=serial or "attached phone",
        components=components,
        samples=samples,
        backend=backend,
    )
    return save_profile(found, profiles_dir(artifact)), found


def is_preset(what: str) -> bool:
    """Return whether `what` is a shipped preset or a TOML file."""
    return what in preset_names() or Path(what).suffix == ".toml"


def estimate_preset(preset: str, devices: Sequence[str]) -> list[StoredProfile]:
    """Estimate a preset in place of a measurement; notes and errors say why it is an estimate."""
    unmeasured = VendorError(
        f"{preset} is a preset",
        next_step="mobilevd-deploy export makes an artifact from a checkpoint; profile measures it through "
        "AI Hub with a token (qai-hub configure --api_token TOKEN), or on a phone with profile phone",
    )
    return estimate_devices(preset, devices, unmeasured=unmeasured)


def estimate_devices(
    what: str | None,
    devices: Sequence[str],
    progress: Progress | None = None,
    *,
    unmeasured: VendorError | None = None,
) -> list[StoredProfile]:
    """Estimate an artifact or preset on every device, and store the profiles of an artifact.

    Args:
        what: an artifact's folder, or a preset's name or TOML file; None: the newest artifact below the
            working directory.
        devices: phones or chips by name.
        progress: receives the name of the newest artifact if `what` is None.
        unmeasured: why nothing could be measured; it becomes a note of every profile.

    Raises UsageError for an unknown device, for no device, and if no estimate is possible. With `unmeasured`
    the last one is a VendorError with both reasons.
    """
    from mobilevd_deploy.profiling.estimate import estimate_profile

    if not devices:
        raise UsageError("no device is named", next_step='for example --device "Xiaomi 14 Pro"')
    for device in devices:
        find(device)  # report a misspelt name first, whatever else is missing
    source: Artifact | str
    if what is None:
        source = find_newest(Path(), advice="name one, or a preset such as mobilevd, as the argument")
        if progress:
            progress.say(f"estimating {source.root}")
    else:
        source = Artifact.open(what) if (Path(what) / MANIFEST).exists() else what
    found: list[StoredProfile] = []
    for device in devices:
        try:
            profile = estimate_profile(source, device)
        except UsageError as error:
            if unmeasured is None:
                raise
            reasons = f"{unmeasured.what}, and there is no estimate: {error.what}"
            raise VendorError(reasons, next_step=f"{unmeasured.next_step}; {error.next_step}") from error
        if unmeasured is not None:
            note = f"nothing was measured: {unmeasured.what}; {unmeasured.next_step}"
            profile = dataclasses.replace(profile, notes=(note, *profile.notes))
        path = save_profile(profile, profiles_dir(source)) if isinstance(source, Artifact) else None
        found.append((path, profile))
    return found
