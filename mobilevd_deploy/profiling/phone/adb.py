"""The adb program: attached phones, shell commands and file transfer; its errors become VendorError."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from mobilevd_deploy.errors import MobileVDError, ResourceError, UsageError, VendorError

SHELL_SECONDS = 60.0
# Slower than any phone hashes or cable carries, so that only a hanging call is ended.
BYTES_PER_SECOND = 1e6

_ATTACHED = re.compile(r"(\S+)\s+(no permissions|\w+)(.*)")
_ENDED = "mobilevd-deploy: exit "

AGAIN = "run the same command again; files that are there are not pushed again"


@dataclass(frozen=True)
class Attached:
    """A line of `adb devices -l`: `state` is "device" where the phone is ready."""

    serial: str
    state: str
    model: str | None

    def __str__(self) -> str:
        return self.serial if self.model is None else f"{self.serial} ({self.model})"


class Adb:
    """One attached phone.

    Every call raises VendorError with the next step, or ResourceError if the phone's storage is full.
    """

    def __init__(self, program: str, serial: str) -> None:
        self.serial = serial
        self._program = program

    @classmethod
    def open(cls, serial: str = "") -> Adb:
        """Open the phone with this serial number, or with ANDROID_SERIAL's, or else the only attached one.

        Raises UsageError if several phones are attached or none has the number; VendorError without adb or a
        phone, and for a phone that is not ready.
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

    def shell(self, command: str, seconds: float = SHELL_SECONDS) -> tuple[int, str]:
        """Run a command line in the phone's shell; return its exit status, and its output and errors.

        Raises VendorError also if the connection ends before the command.
        """
        # The status is part of the text, because adb's own exit status has other meanings too.
        script = f"({command}) 2>&1; status=$?; echo; echo {quote(_ENDED)}$status"
        done = self._run("shell", script, seconds=seconds)
        text, mark, status = done.stdout.rpartition(f"\n{_ENDED}")
        if not mark:
            raise self._explain("shell", done)
        return int(status), text

    def push(self, source: Path, target: str) -> None:
        """Copy a file to the phone; `target` is the file's path there."""
        seconds = SHELL_SECONDS + source.stat().st_size / BYTES_PER_SECOND
        done = self._run("push", str(source), target, seconds=seconds)
        if done.returncode:
            raise self._explain("push", done)

    def _run(self, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
        try:
            return _adb(self._program, "-s", self.serial, *arguments, seconds=seconds)
        except subprocess.TimeoutExpired:
            raise VendorError(
                f"{self.serial} did not answer within {seconds:.0f} s (adb {arguments[0]})",
                next_step=f"unlock the phone, look at the cable; then {AGAIN}",
            ) from None

    def _explain(self, doing: str, done: subprocess.CompletedProcess[str]) -> MobileVDError:
        said = f"{done.stdout}\n{done.stderr}"
        if "No space left on device" in said:
            return phone_full(self.serial)
        for words, state in (("unauthorized", "unauthorized"), ("device offline", "offline")):
            if words in said:
                return _not_ready(self.serial, state)
        if "no devices/emulators" in said:
            return _no_phone()
        gone = ("not found", "couldn't read from device", "closed", "EOF", "reset", "protocol fault")
        if not done.stderr.strip() or any(words in done.stderr for words in gone):
            return VendorError(
                f"the connection to {self.serial} was lost (adb {doing})",
                next_step=f"plug it in again, then {AGAIN}",
            )
        reason = [line for line in done.stderr.splitlines() if line.strip()][-1].strip()
        return VendorError(f"adb {doing} on {self.serial}: {reason}", next_step="run adb by hand to see more")


def attached() -> tuple[str, list[Attached]]:
    """Return the path of `adb` and the phones that it lists, ready or not. Raises VendorError."""
    program = shutil.which("adb")
    if program is None:
        raise VendorError(
            "adb is not installed",
            next_step="apt install adb, brew install android-platform-tools, or Google's platform-tools; "
            "it has to be on the PATH",
        )
    try:
        done = _adb(program, "devices", "-l", seconds=SHELL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VendorError(
            f"{program} does not work: {error}", next_step="adb kill-server, then run the same command again"
        ) from None
    _, mark, lines = done.stdout.partition("List of devices attached")
    if done.returncode or not mark:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no list of devices"]
        raise VendorError(
            f"{program} does not work: {reason[0]}",
            next_step="adb kill-server, then run the same command again",
        )
    found = []
    for line in filter(None, map(str.strip, lines.splitlines())):
        if match := _ATTACHED.fullmatch(line):
            model = re.search(r"\bmodel:(\S+)", match[3])
            found.append(Attached(match[1], match[2], model[1].replace("_", " ") if model else None))
    return program, found


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


def phone_full(serial: str, detail: str = "") -> ResourceError:
    """Return the error for a phone without space."""
    return ResourceError(
        f"{serial}: the phone's storage is full{detail}", next_step=f"free some space on it, then {AGAIN}"
    )
