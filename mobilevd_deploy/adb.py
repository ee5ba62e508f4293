"""A phone on the desk: an artifact goes into the app's folder, and the app's benchmark is run, over adb.

profile_over_adb()      READ FIRST: install, start, wait, read
├── install()           into the app's folder, compared there file by file, named by one `mv`
└── Adb                 the `adb` program: each of its errors becomes one sentence and a next step

What the benchmark writes is benchmark.py's matter. Nothing here was tried on a phone: adb's own words were
taken from version 29 and from its source, and the tests run against a program that repeats them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from mobilevd_deploy.artifact import MANIFEST, MANIFEST_DIGEST, Artifact
from mobilevd_deploy.benchmark import Benchmark, Timing
from mobilevd_deploy.devices import chip_called
from mobilevd_deploy.errors import MobileVDError, ResourceError, UsageError, VendorError
from mobilevd_deploy.profiles import (
    SCHEMA_VERSION,
    ComponentProfile,
    Latency,
    Profile,
    now,
    runtime_notes,
    total_ms,
)
from mobilevd_deploy.progress import Progress

Backend = Literal["auto", "npu", "cpu"]

PACKAGE = "dev.mobilevd.demo"
FILES = f"/sdcard/Android/data/{PACKAGE}/files"
ARTIFACTS = f"{FILES}/artifacts"
BENCHMARKS = f"{FILES}/benchmarks"

WARMUP = 3
POLL_SECONDS = 1.0
# Compiling for the CPU at full size, the slowest single step, takes a phone some minutes.
STALL_SECONDS = 900.0

_SHELL_SECONDS = 60.0
# Slower than any phone hashes or any cable carries, so that only what hangs is ended.
_BYTES_PER_SECOND = 1e6
_SPARE_BYTES = 64 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ATTACHED = re.compile(r"(\S+)\s+(no permissions|\w+)(.*)")
_ENDED = "mobilevd-deploy: exit "
_AGAIN = "the same command again; files that are there are not pushed again"


@dataclass(frozen=True)
class Attached:
    """A line of `adb devices -l`: `state` is "device" where the phone is ready."""

    serial: str
    state: str
    model: str | None

    def __str__(self) -> str:
        return self.serial if self.model is None else f"{self.serial} ({self.model})"


class Adb:
    """One attached phone, by the `adb` program.

    Every call raises VendorError with what is wrong and the next step, or ResourceError where the phone's
    storage is full.
    """

    def __init__(self, program: str, serial: str) -> None:
        self.serial = serial
        self._program = program

    @classmethod
    def open(cls, serial: str = "") -> Adb:
        """Take the phone of that serial number, of ANDROID_SERIAL, or else the only one that is attached.

        Raises UsageError where several are, or none has that number; VendorError where there is no adb, no
        phone, or one that does not let us in.
        """
        program, phones = attached()
        serial = serial or os.environ.get("ANDROID_SERIAL", "")
        if serial:
            chosen = next((phone for phone in phones if phone.serial == serial), None)
            if chosen is None:
                there = f"attached: {', '.join(map(str, phones))}" if phones else "no phone is attached"
                raise UsageError(f"no phone {serial} is attached", next_step=f"{there}; see adb devices")
        else:
            ready = [phone for phone in phones if phone.state == "device"]
            if len(ready) > 1:
                raise UsageError(
                    f"several phones are attached: {', '.join(map(str, ready))}",
                    next_step=f"choose one: --serial {ready[0].serial}",
                )
            chosen = next(iter(ready or phones), None)
            if chosen is None:
                raise _no_phone()
        if chosen.state != "device":
            raise _not_ready(chosen.serial, chosen.state)
        return cls(program, chosen.serial)

    def shell(self, command: str, seconds: float = _SHELL_SECONDS) -> tuple[int, str]:
        """Run a command line in the phone's shell; return its exit status, and its output and errors.

        VendorError also where the connection ended before the command did.
        """
        # The status travels in the text: adb itself ends with 1 or 255 for reasons of its own.
        script = f"({command}) 2>&1; status=$?; echo; echo {quote(_ENDED)}$status"
        done = self._run("shell", script, seconds=seconds)
        text, mark, status = done.stdout.rpartition(f"\n{_ENDED}")
        if not mark:
            raise self._explain("shell", done)
        return int(status), text

    def push(self, source: Path, target: str) -> None:
        """Copy a file to the phone; `target` is the file's path there."""
        seconds = _SHELL_SECONDS + source.stat().st_size / _BYTES_PER_SECOND
        done = self._run("push", str(source), target, seconds=seconds)
        if done.returncode:
            raise self._explain("push", done)

    def _run(self, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
        try:
            return _adb(self._program, "-s", self.serial, *arguments, seconds=seconds)
        except subprocess.TimeoutExpired:
            raise VendorError(
                f"{self.serial} did not answer within {seconds:.0f} s (adb {arguments[0]})",
                next_step=f"unlock the phone, look at the cable; then {_AGAIN}",
            ) from None

    def _explain(self, doing: str, done: subprocess.CompletedProcess[str]) -> MobileVDError:
        said = f"{done.stdout}\n{done.stderr}"
        if "No space left on device" in said:
            return _full(self.serial)
        for words, state in (("unauthorized", "unauthorized"), ("device offline", "offline")):
            if words in said:
                return _not_ready(self.serial, state)
        if "no devices/emulators" in said:
            return _no_phone()
        gone = ("not found", "couldn't read from device", "closed", "EOF", "reset", "protocol fault")
        if not done.stderr.strip() or any(words in done.stderr for words in gone):
            return VendorError(
                f"{self.serial} went away in the middle (adb {doing})",
                next_step=f"plug it in again, then {_AGAIN}",
            )
        reason = [line for line in done.stderr.splitlines() if line.strip()][-1].strip()
        return VendorError(f"adb {doing} on {self.serial}: {reason}", next_step="see what adb says by hand")


def attached() -> tuple[str, list[Attached]]:
    """Return the path of `adb`, and the phones that it sees, ready or not; VendorError if it is broken."""
    program = shutil.which("adb")
    if program is None:
        raise VendorError(
            "adb is not on this computer",
            next_step="apt install adb, brew install android-platform-tools, or Google's platform-tools; "
            "it has to be on the PATH",
        )
    try:
        done = _adb(program, "devices", "-l", seconds=_SHELL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VendorError(
            f"{program} does not work: {error}", next_step="adb kill-server, then again"
        ) from None
    _, mark, lines = done.stdout.partition("List of devices attached")
    if done.returncode or not mark:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no list of devices"]
        raise VendorError(f"{program} does not work: {reason[0]}", next_step="adb kill-server, then again")
    found = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        if match := _ATTACHED.fullmatch(line):
            model = re.search(r"\bmodel:(\S+)", match[3])
            found.append(Attached(match[1], match[2], model[1].replace("_", " ") if model else None))
    return program, found


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

    1. Install the artifact, unless it lies there already.
    2. Start the app's benchmark with a fresh run id, and wait for its file; an app that dies or stands still
       is an error that names the component.
    3. Read the result strictly, and compare run and artifact with what was asked for.

    `components`: only these (all). Raises UsageError for a component that the artifact does not have;
    VendorError, ResourceError as `Adb`; ArtifactError for a damaged artifact or a result that makes no sense.
    What went wrong inside of the app is an error of the profile's component.
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
    except BaseException:  # also Ctrl-C: the phone would go on for minutes
        with contextlib.suppress(MobileVDError):
            adb.shell(f"am force-stop {PACKAGE}")
        raise
    progress.end()
    measured = found.artifact
    if (found.run_id, measured.manifest_sha256) != (run_id, artifact.digest):
        raise VendorError(
            f"the app measured another artifact ({measured.name}, {measured.manifest_sha256[:12]})",
            next_step="profile again; if it stays so, install the app anew (make apk)",
        )
    return read_benchmark(artifact, found, asked_for, components)


def read_benchmark(
    artifact: Artifact, found: Benchmark, asked_for: str, components: tuple[str, ...] = ()
) -> Profile:
    """Turn the app's result into a profile; components without times carry the reason."""
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
    """Put an artifact into the app's folder on the phone; return its name there.

    It is pushed aside, every file's sha256 is taken on the phone and compared, and one `mv` names it.
    Nothing is done for one that is there; of one that was pushed in part only the rest is pushed.

    Raises UsageError for a folder name that the phone should not have, ArtifactError for a damaged artifact,
    VendorError and ResourceError as `Adb`, and VendorError where the app is not installed.
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
            f"{name} arrived damaged on {adb.serial}", next_step=f"try another cable or port; {_AGAIN}"
        )
    # What the shell writes belongs to the shell; the app has to read it, and to remove it one day. Some
    # phones refuse and need none of it.
    adb.shell(f"chmod -R a+rwX {quote(partial)}")
    swap = f"rm -rf {quote(old)} && if [ -d {quote(final)} ]; then mv {quote(final)} {quote(old)}; fi"
    _must(adb, f"{swap} && mv {quote(partial)} {quote(final)} && rm -rf {quote(old)}", "give it its name")
    return name


def require_app(adb: Adb) -> None:
    """Raise VendorError unless the demo app is on the phone."""
    status, said = adb.shell(f"pm path {PACKAGE}")
    if status or "package:" not in said:
        raise VendorError(
            f"the demo app ({PACKAGE}) is not installed on {adb.serial}",
            next_step="make apk builds it, adb install puts it there; start it once",
        )


def _require_space(adb: Adb, needed: int) -> None:
    _, said = adb.shell(f"df -k {ARTIFACTS}")
    columns = re.search(r"\s(\d+)\s+(\d+)\s+(\d+)\s+\d+%", said)
    if columns and int(columns[3]) * 1024 < needed + _SPARE_BYTES:
        raise _full(
            adb.serial, f": {needed / 1e6:,.0f} MB are needed, {int(columns[3]) / 1e3:,.0f} MB are free"
        )


def _digests(adb: Adb, folder: str, total: int) -> dict[str, str]:
    """Return the sha256 of every file below a folder of the phone, by relative path; {} if there is none."""
    seconds = _SHELL_SECONDS + total / _BYTES_PER_SECOND
    status, said = adb.shell(f"cd {quote(folder)} && find . -type f -exec sha256sum {{}} +", seconds)
    found = re.findall(r"^([0-9a-f]{64})\s+\*?\./(.+?)\r?$", said, re.MULTILINE)
    return {} if status else {path: digest for digest, path in found}


def _must(adb: Adb, command: str, doing: str) -> None:
    status, said = adb.shell(command)
    if status == 0:
        return
    if "No space left on device" in said:
        raise _full(adb.serial)
    lines = said.strip().splitlines() or [f"exit status {status}"]
    raise VendorError(
        f"{adb.serial} refuses to {doing}: {lines[-1]}",
        next_step="start the app once, so that Android makes its folder; then the same command again",
    )


def _start(
    adb: Adb, name: str, run_id: str, components: tuple[str, ...], samples: int, backend: Backend
) -> None:
    # A phone that sleeps measures its sleeping clocks.
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
        # Twice, because the file may get its name between our two looks.
        deaths = deaths + 1 if text.rstrip().endswith("dead") else 0
        if deaths > 1:
            raise VendorError(
                f"the app ended in the middle of the benchmark{where}",
                next_step=f"start it on the phone, it says why; or adb -s {adb.serial} logcat -b crash -d",
            )
        if text != last:
            last, since = text, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            raise VendorError(
                f"the benchmark stands still since {stall_seconds:.0f} s{where}",
                next_step="unlock the phone, close other apps; then profile again",
            )
        time.sleep(poll_seconds)


def _running(text: str) -> dict[str, Any]:
    """Read what the app says of a run that goes on; {} where it says nothing, or is being written."""
    with contextlib.suppress(ValueError):
        values = json.loads(text.strip().removesuffix("dead"))
        if isinstance(values, dict) and isinstance(values.get("sample", 0), int):
            return values
    return {}


def _adb(program: str, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
        check=False,
    )


def _no_phone() -> VendorError:
    return VendorError(
        "no phone is attached",
        next_step="plug one in and switch on USB debugging (Settings, Developer options); see adb devices",
    )


def _not_ready(serial: str, state: str) -> VendorError:
    what, next_step = {
        "unauthorized": (
            "has not allowed this computer",
            "unlock the phone and allow USB debugging; no dialog: adb kill-server, and plug it in again",
        ),
        "offline": ("is offline", "unplug it and plug it in again; adb reconnect offline"),
        "no permissions": (
            "cannot be opened by this user",
            "apt install android-sdk-platform-tools-common (its udev rules), and plug it in again",
        ),
    }.get(state, (f"is in state {state!r}", "wait until it has started; see adb devices"))
    return VendorError(f"{serial} {what}", next_step=next_step)


def _full(serial: str, detail: str = "") -> ResourceError:
    return ResourceError(
        f"{serial}: the phone's storage is full{detail}", next_step=f"free some there, then {_AGAIN}"
    )
