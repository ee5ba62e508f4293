"""Profile an artifact on an attached phone: install it into the app over adb and run the app's benchmark.

profile_over_adb()      READ FIRST: install, start, wait, read
├── install()           push, compare every file's sha256 on the phone, rename with one `mv`
├── Adb                 the `adb` program, see adb.py
└── Benchmark           the app's result, see result.py

None of this was tried on a phone. adb's messages are those of version 29 and its source; the tests run a
program that repeats them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping
from shlex import quote
from typing import Any, Literal

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import MANIFEST, MANIFEST_DIGEST
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.devices import chip_called
from mobilevd_deploy.errors import MobileVDError, UsageError, VendorError
from mobilevd_deploy.profiling.phone.adb import AGAIN, BYTES_PER_SECOND, SHELL_SECONDS, Adb, phone_full
from mobilevd_deploy.profiling.phone.result import Benchmark, Timing
from mobilevd_deploy.profiling.profile import (
    SCHEMA_VERSION,
    ComponentProfile,
    Latency,
    Profile,
    now,
    runtime_notes,
    total_ms,
)

Backend = Literal["auto", "npu", "cpu"]

PACKAGE = "dev.mobilevd.demo"
FILES = f"/sdcard/Android/data/{PACKAGE}/files"
ARTIFACTS = f"{FILES}/artifacts"
BENCHMARKS = f"{FILES}/benchmarks"

WARMUP = 3
POLL_SECONDS = 1.0
# The slowest single step, loading the full-size network on the CPU, takes a phone some minutes.
STALL_SECONDS = 900.0

_SPARE_BYTES = 64 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def profile_over_adb(
    artifact: Artifact,
    adb: Adb,
    progress: Progress | None = None,
    *,
    asked_for: str = "attached phone",
    components: tuple[str, ...] = (),
    samples: int = 100,
    backend: Backend = "auto",
    poll_seconds: float = POLL_SECONDS,
    stall_seconds: float = STALL_SECONDS,
) -> Profile:
    """Run the app's benchmark on an artifact, on the attached phone.

    1. Install the artifact, unless it is installed already.
    2. Start the app's benchmark with a new run id and wait for its file. An app that ends or makes no
       progress is an error that names the component.
    3. Read the result strictly, and compare its run id and artifact with the request.

    `components`: only these; empty: all. Raises ArtifactError for an unknown component, a damaged artifact or
    an invalid result; VendorError, ResourceError as `Adb`. An error inside of the app becomes an error of the
    profile's component.
    """
    progress = progress or Progress()
    for name in components:
        artifact.manifest.component(name)
    name = install(artifact, adb, progress)
    run_id = f"{now().replace(':', '').replace('-', '')}-{secrets.token_hex(4)}"
    progress.begin("benchmark on the phone")
    try:
        _start(adb, name, run_id, components, samples, backend)
        found = Benchmark.from_json(
            _wait(
                adb,
                run_id,
                len(components or artifact.manifest.components),
                samples,
                progress,
                poll_seconds,
                stall_seconds,
            )
        )
    except BaseException:  # also Ctrl-C: the phone would continue for minutes
        with contextlib.suppress(MobileVDError):
            adb.shell(f"am force-stop {PACKAGE}")
        raise
    progress.end()
    measured = found.artifact
    if (found.run_id, measured.manifest_sha256) != (run_id, artifact.digest):
        raise VendorError(
            f"the app measured another artifact ({measured.name}, {measured.manifest_sha256[:12]})",
            next_step="profile again; if that does not help, reinstall the app (make apk)",
        )
    return read_benchmark(artifact, found, asked_for, components)


def read_benchmark(
    artifact: Artifact, found: Benchmark, asked_for: str, components: tuple[str, ...] = ()
) -> Profile:
    """Turn the app's result into a profile; a component without times has an error."""
    timed = {timing.name: timing for timing in found.components}
    chip = chip_called(found.device.soc or "")
    wanted = components or tuple(component.name for component in artifact.manifest.components)
    rows = tuple(_component(name, timed.get(name), found) for name in wanted)
    compiled = [binary.sdk for component in artifact.manifest.components for binary in component.npu]
    notes = list(runtime_notes(compiled, found.runtime.qnn, "the app's libraries"))
    on_cpu = [row.name for row in rows if row.ms and not row.ops.get("NPU")]
    if on_cpu and found.asked_backend != "cpu":
        notes.append(f"{', '.join(on_cpu)}: on the phone's CPU, not on its NPU")
    heat = (found.thermal_before, found.thermal_after)
    if set(heat) - {"none", None}:
        notes.append(
            f"the phone was hot (thermal state {heat[0]} before, {heat[1]} after): clocks may be lower"
        )
    free, all_memory = found.memory.available_bytes / 1e9, found.memory.total_bytes / 1e9
    notes.append(f"Android {found.device.android}; {free:.1f} of {all_memory:.1f} GB memory were free")
    return Profile(
        schema_version=SCHEMA_VERSION,
        asked_for=asked_for,
        device=f"{found.device.manufacturer} {found.device.model}",
        chipset=chip.name if chip else found.device.soc or "unknown chip",
        source="adb",
        created=now(),
        artifact=artifact.manifest.name,
        manifest_sha256=artifact.digest,
        components=rows,
        total_ms=total_ms(rows),
        notes=tuple(notes),
        tools={"app": found.app_version, "onnxruntime": found.runtime.onnxruntime}
        | ({"qairt of the app": found.runtime.qnn} if found.runtime.qnn else {}),
    )


def _component(name: str, timing: Timing | None, found: Benchmark) -> ComponentProfile:
    if timing is None:
        error = found.error
        if error is None:
            return ComponentProfile(name, None, error="the app did not measure it")
        where = " at ".join(filter(None, (error.component, error.step)))
        before = f"{where}: " if where else ""
        return ComponentProfile(name, None, error=f"the app stopped: {before}{error.message}")
    ops = {"NPU": timing.npu_nodes, "CPU": timing.cpu_nodes}
    return ComponentProfile(
        name,
        Latency.of(timing.ms),
        first_load_ms=timing.load_ms,
        peak_bytes=timing.peak_bytes,
        ops={unit: count for unit, count in ops.items() if count},
    )


def install(artifact: Artifact, adb: Adb, progress: Progress | None = None) -> str:
    """Install an artifact into the app's folder on the phone; return its name there.

    Files are pushed aside, their sha256 compared on the phone, and one `mv` renames the folder. An installed
    artifact is left as it is; of a partly pushed one, only the missing files are pushed.

    Raises UsageError for a folder name with other characters than letters, digits and "._-", ArtifactError
    for a damaged artifact, VendorError and ResourceError as `Adb`, VendorError if the app is not installed.
    """
    progress, name = progress or Progress(), artifact.root.resolve().name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be an artifact's name on the phone",
            next_step="rename the folder: letters, digits, dots, underscores and dashes",
        )
    artifact.verify()
    require_app(adb)
    entries = {entry.path: (entry.sha256, entry.bytes) for entry in artifact.manifest.all_files()}
    for own in (MANIFEST, MANIFEST_DIGEST):
        content = (artifact.root / own).read_bytes()
        entries[own] = hashlib.sha256(content).hexdigest(), len(content)
    wanted = {path: digest for path, (digest, _) in entries.items()}
    total = sum(size for _, size in entries.values())
    final, partial, old = (f"{ARTIFACTS}/{n}" for n in (name, f".{name}.partial", f".{name}.old"))
    if _digests(adb, final, total) == wanted:
        progress.say(f"{name} is on the phone already")
        return name
    there = _digests(adb, partial, total)
    if set(there) - set(wanted):  # of an earlier artifact of that name
        _must(adb, f"rm -rf {quote(partial)}", "clear what an earlier run left")
        there = {}
    missing = {path: size for path, (digest, size) in entries.items() if there.get(path) != digest}
    folders = dict.fromkeys(f"{partial}/{path}".rpartition("/")[0] for path in entries)
    # By the shell, because adb's own push may not make folders in Android/data.
    _must(adb, f"mkdir -p {' '.join(map(quote, folders))}", "make its folder")
    _require_space(adb, sum(missing.values()))
    progress.begin(f"push {name} ({sum(missing.values()) / 1e6:,.1f} MB)")
    pushed = 0
    for path, size in missing.items():
        adb.push(artifact.root / path, f"{partial}/{path}")
        pushed += size
        progress.advance(pushed / max(sum(missing.values()), 1))
    progress.end()
    if _digests(adb, partial, total) != wanted:
        raise VendorError(
            f"{name} arrived damaged on {adb.serial}", next_step=f"try another cable or port; {AGAIN}"
        )
    # The shell owns the files that it writes; the app must be able to read and remove them. Some phones
    # refuse this and do not need it.
    adb.shell(f"chmod -R a+rwX {quote(partial)}")
    swap = f"rm -rf {quote(old)} && if [ -d {quote(final)} ]; then mv {quote(final)} {quote(old)}; fi"
    _must(adb, f"{swap} && mv {quote(partial)} {quote(final)} && rm -rf {quote(old)}", "give it its name")
    return name


def require_app(adb: Adb) -> None:
    """Raise VendorError unless the app is installed on the phone."""
    status, said = adb.shell(f"pm path {PACKAGE}")
    if status or "package:" not in said:
        raise VendorError(
            f"the demo app ({PACKAGE}) is not installed on {adb.serial}",
            next_step="build it with make apk, install it with adb install, and start it once",
        )


def _require_space(adb: Adb, needed: int) -> None:
    _, said = adb.shell(f"df -k {ARTIFACTS}")
    columns = re.search(r"\s(\d+)\s+(\d+)\s+(\d+)\s+\d+%", said)
    if columns and int(columns[3]) * 1024 < needed + _SPARE_BYTES:
        raise phone_full(
            adb.serial, f": {needed / 1e6:,.0f} MB are needed, {int(columns[3]) / 1e3:,.0f} MB are free"
        )


def _digests(adb: Adb, folder: str, total: int) -> dict[str, str]:
    """Return the sha256 of every file below a folder of the phone, by relative path; {} if there is none."""
    seconds = SHELL_SECONDS + total / BYTES_PER_SECOND
    status, said = adb.shell(f"cd {quote(folder)} && find . -type f -exec sha256sum {{}} +", seconds)
    found = re.findall(r"^([0-9a-f]{64})\s+\*?\./(.+?)\r?$", said, re.MULTILINE)
    return {} if status else {path: digest for digest, path in found}


def _must(adb: Adb, command: str, doing: str) -> None:
    status, said = adb.shell(command)
    if status == 0:
        return
    if "No space left on device" in said:
        raise phone_full(adb.serial)
    lines = said.strip().splitlines() or [f"exit status {status}"]
    raise VendorError(
        f"{adb.serial} refuses to {doing}: {lines[-1]}",
        next_step="start the app once, so that Android makes its folder; then the same command again",
    )


def _start(
    adb: Adb, name: str, run_id: str, components: tuple[str, ...], samples: int, backend: Backend
) -> None:
    # A sleeping phone runs at lower clocks.
    adb.shell(f"input keyevent KEYCODE_WAKEUP; am force-stop {PACKAGE}")
    extras: Mapping[str, str] = {"artifact": name, "backend": backend, "run_id": run_id}
    if components:
        extras = {**extras, "components": ",".join(components)}
    words = [f"--es {key} {quote(value)}" for key, value in extras.items()]
    numbers = f"--ei samples {samples} --ei warmup {WARMUP}"
    status, said = adb.shell(f"am start -W -n {PACKAGE}/.BenchmarkActivity {' '.join(words)} {numbers}")
    if status or re.search(r"^(Error|Exception|.*SecurityException)", said, re.MULTILINE):
        lines = [line.strip() for line in said.splitlines() if "rror" in line or "xception" in line]
        what = f": {lines[-1]}" if lines else ""
        raise VendorError(
            f"{adb.serial} does not start the app's benchmark{what}",
            next_step="the app is of another version: make apk, adb install -r",
        )


def _wait(
    adb: Adb,
    run_id: str,
    components: int,
    samples: int,
    progress: Progress,
    poll_seconds: float,
    stall_seconds: float,
) -> str:
    """Return the text of the finished result file."""
    final, partial = f"{BENCHMARKS}/{run_id}.json", f"{BENCHMARKS}/.{run_id}.json.partial"
    look = (
        f"if [ -f {final} ]; then echo done; cat {final}; "
        f"else echo running; cat {partial} 2>/dev/null; echo; pidof {PACKAGE} >/dev/null || echo dead; fi"
    )
    last, since, seen, deaths = "", time.monotonic(), list[str](), 0
    while True:
        _, said = adb.shell(look)
        state, _, text = said.partition("\n")
        if state.strip() == "done":
            return text
        now_running = _running(text)
        if now_running.get("component") not in (None, *seen):
            seen.append(now_running["component"])
            progress.say(f"measuring {seen[-1]}")
        where = f" at {seen[-1]}" if seen else ""
        sample = now_running.get("sample", 0)
        progress.advance((max(len(seen) - 1, 0) + sample / samples) / components)
        # Two deaths in a row, because the app may rename the file and end between two polls.
        deaths = deaths + 1 if text.rstrip().endswith("dead") else 0
        if deaths > 1:
            raise VendorError(
                f"the app ended during the benchmark{where}",
                next_step=f"start it on the phone to see why, or adb -s {adb.serial} logcat -b crash -d",
            )
        if text != last:
            last, since = text, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            raise VendorError(
                f"no benchmark progress for {stall_seconds:.0f} s{where}",
                next_step="unlock the phone, close other apps; then profile again",
            )
        time.sleep(poll_seconds)


def _running(text: str) -> dict[str, Any]:
    """Read the app's report of a running benchmark; {} if there is none, or if it is incomplete."""
    with contextlib.suppress(ValueError):
        values = json.loads(text.strip().removesuffix("dead"))
        if isinstance(values, dict) and isinstance(values.get("sample", 0), int):
            return values
    return {}
