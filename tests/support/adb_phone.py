"""A stand-in for `adb` and the phone behind it: a program that answers as adb does, and a folder as /sdcard.

Commands run in the host's own shell, with /sdcard replaced by the folder, and with small scripts in place of
Android's `pm`, `am`, `pidof`, `df` and `input`. Every number that its app writes is made up. adb's messages
are those of version 29 and of its source; Android's are those of `pm` and `am` of Android 14.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support import ROOT

PACKAGE = "dev.mobilevd.demo"
SERIAL = "3f9c2a71"

ADB = r"""#!/bin/sh
# Plain sh, because a test calls it twenty times. Settings are files in $home/set.
home=$(dirname "$0")/..
is() { [ -e "$home/set/$1" ]; }
at() { is "$1" && case "$2" in *"$(cat "$home/set/$1")") true ;; *) false ;; esac; }
fail() { echo "$1" >&2; exit "${2:-1}"; }
is broken && fail "adb: cannot bind 'tcp:5037': Address already in use"
if [ "$1" = devices ]; then
    echo "* daemon not running; starting now at tcp:5037" >&2
    echo "List of devices attached"
    while read -r serial how; do
        [ "$how" = device ] && how="device usb:1-4 product:houji model:Made_up_Phone device:houji"
        echo "$serial               $how transport_id:1"
    done < "$home/set/devices"
    echo
    exit
fi
[ "$1" = -s ] || fail "adb: unexpected $1"
serial=$2 command=$3
shift 3
how=$(sed -n "s/^$serial //p" "$home/set/devices")
case "$how" in
    "") fail "error: device '$serial' not found" ;;
    unauthorized) fail "error: device unauthorized.
This adb server's \$ADB_VENDOR_KEYS is not set
Try 'adb kill-server' if that seems wrong.
Otherwise check for a confirmation dialog on your device." ;;
    offline) fail "error: device offline" ;;
esac
if [ "$command" = push ]; then
    echo "${1##*/}" >> "$home/pushed"
    failed="adb: error: failed to copy '$1' to '$2':"
    if at gone_at "$1"; then
        : > "$home/set/devices"
        fail "$failed couldn't read from device"
    fi
    at full_at "$1" && fail "$failed remote couldn't write: No space left on device"
    [ -d "$(dirname "$home/phone$2")" ] || fail "$failed remote secure_mkdirs failed: Operation not permitted"
    cp "$1" "$home/phone$2"
    at flip_at "$1" && echo x >> "$home/phone$2"
    echo "$1: 1 file pushed, 0 skipped. 32.0 MB/s (4096 bytes in 0.001s)"
elif [ "$command" = shell ]; then
    is hangs && exec sleep 60
    if is breaks; then # the cable was pulled: adb ends without a word
        echo "half of the outp"
        exit 255
    fi
    line=$(printf %s "$*" | sed "s|/sdcard|$home/phone/sdcard|g")
    export PHONE="$home" PATH="$home/android:$PATH"
    exec sh -c "$line" < /dev/null
else
    fail "adb: unknown command $command"
fi
"""

APP = r'''
import hashlib, json, os, re, sys, time
from pathlib import Path

home = Path(os.environ["PHONE"])
state = json.loads((home / "app.json").read_text())
arguments = sys.argv[1:]
files = home / "phone/sdcard/Android/data/dev.mobilevd.demo/files"
alive = home / "app.pid"

def write(extras):
    """What the app does; every number is made up."""
    run, folder = extras["run_id"], files / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    partial, final = folder / f".{run}.json.partial", folder / f"{run}.json"
    artifact = files / "artifacts" / extras["artifact"]
    manifest = (artifact / "manifest.json").read_bytes()
    names = [c["name"] for c in json.loads(manifest)["components"]]
    names = [n for n in names if n in extras.get("components", ",".join(names)).split(",")]
    result = json.loads((home / "benchmark.json").read_text())
    timing, result["components"] = result["components"][0], []
    for at, component in enumerate(names):
        partial.write_text(json.dumps({"state": "running", "component": component, "sample": 1}))
        time.sleep(state.get("seconds", 0.05))
        if state.get("crash_at") == component:
            alive.unlink()
            return
        if state.get("fails_at") == component:
            result["state"] = "failed"
            result["error"] = {"message": "error 5005", "component": component, "step": "load"}
            break
        times = [10.0 * (at + 1) + 0.25 * i for i in range(int(extras["samples"]))]
        result["components"].append(timing | {"name": component, "ms": times} | state.get("timing", {}))
    while state.get("stalls") and alive.exists():
        time.sleep(0.1)
    if not alive.exists():
        return  # it was stopped
    result |= {"run_id": run, "samples": int(extras["samples"]), "warmup": int(extras["warmup"])}
    result |= {"asked_backend": extras["backend"]}
    result["artifact"] = {"name": extras["artifact"], "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
    result |= state.get("result", {})
    partial.write_text(state.get("text") or json.dumps(result))
    partial.rename(final)

if arguments[0] == "start":
    print("Starting: Intent { cmp=dev.mobilevd.demo/.BenchmarkActivity (has extras) }")
    if state.get("old_app"):
        print("Error type 3")
        print("Error: Activity class {dev.mobilevd.demo/dev.mobilevd.demo.BenchmarkActivity} does not exist.")
        sys.exit(0)
    assert arguments[1:4] == ["-W", "-n", "dev.mobilevd.demo/.BenchmarkActivity"], arguments
    extras = {key: value for _, key, value in zip(*[iter(arguments[4:])] * 3, strict=True)}
    assert re.fullmatch(r"[\w-]{1,64}", extras["run_id"]), extras
    print("Status: ok\nActivity: dev.mobilevd.demo/.BenchmarkActivity\nTotalTime: 312\nComplete")
    alive.write_text("4321")
    sys.stdout.flush()
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    write(extras)
'''


ANDROID = {
    "pm": '[ ! -e "$PHONE/set/absent" ] && echo package:/data/app/~~x/dev.mobilevd.demo-y/base.apk',
    "pidof": '[ -e "$PHONE/app.pid" ]',
    "df": 'echo "Filesystem     1K-blocks      Used Available Use% Mounted on"; '
    'echo "/dev/fuse      233000000 100000000 $(cat "$PHONE/set/free_kb")  50% /storage/emulated"',
    "input": "true",
    "am": 'if [ "$1" = force-stop ]; then rm -f "$PHONE/app.pid"; else exec "$PHONE/app" "$@"; fi',
}


class Phone:
    """The stand-in below a folder; `bin` belongs to the front of PATH.

    `set` takes `devices`, serial numbers with their states, and faults: gone_at, full_at, flip_at (a file's
    name), breaks, hangs, broken, absent (the app), free_kb; None takes one back. `app` takes what the app
    does: seconds (each component), old_app, crash_at, fails_at (a component), stalls; text, result and timing
    (what it writes instead).
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bin = home / "bin"
        self.files = home / f"phone/sdcard/Android/data/{PACKAGE}/files"
        for folder in (self.files, self.bin, home / "android", home / "set"):
            folder.mkdir(parents=True)
        golden = ROOT / "tests" / "vectors" / "benchmark.json"
        (home / "benchmark.json").write_bytes(golden.read_bytes())
        self._write(self.bin / "adb", ADB)
        self._write(home / "app", f"#!{sys.executable} -IS\n{APP}")
        for name, source in ANDROID.items():
            self._write(home / "android" / name, f"#!/bin/sh\n{source}\n")
        self.set(devices={SERIAL: "device"}, free_kb=100_000_000)
        self.app()

    def set(self, **settings) -> None:
        for name, value in settings.items():
            path = self.home / "set" / name
            path.unlink(missing_ok=True)
            if isinstance(value, dict):
                value = "".join(f"{serial} {how}\n" for serial, how in value.items())
            if value is not None:
                path.write_text(str(value))

    def app(self, **settings) -> None:
        (self.home / "app.json").write_text(json.dumps(settings))

    def pushed(self) -> list[str]:
        """Names of the files that were pushed, in order."""
        return (self.home / "pushed").read_text().splitlines()

    def alive(self) -> bool:
        return (self.home / "app.pid").exists()

    @staticmethod
    def _write(path: Path, source: str) -> None:
        path.write_text(source)
        path.chmod(0o755)
