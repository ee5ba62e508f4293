"""Kill each stage of an export once and resume: writes results/interruptions.json.

    python benchmarks/interruptions.py

The model is benchmarks/small.toml with random weights, exported to context binaries and run on the simulator.
Each stage gets SIGKILL shortly after it begins. The result lists the stages that each run reused, and whether
the final graphs equal those of an uninterrupted export.
"""

from __future__ import annotations

import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from _common import write_result
from full_size import CHECKPOINT, recipe

from mobilevd_deploy.artifact.artifact import Artifact

PRESET = Path(__file__).with_name("small.toml")
BEGUN, REUSED = (
    re.compile(r"\[\d+/\d+\] (.+) \.\.\."),
    re.compile(r"\[\d+/\d+\] (.+): done in an earlier run"),
)
LATEST_S = 1.0


def command(*arguments: object) -> list[str]:
    """Return the command line of the toolkit."""
    return [sys.executable, "-m", "mobilevd_deploy", *map(str, arguments)]


def run_until_killed(export: list[str], killed: set[str], rng: random.Random) -> tuple[str | None, list[str]]:
    """Run an export and kill it in a stage that was not killed before; return it and the reused stages."""
    reused: list[str] = []
    with subprocess.Popen(export, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=listen, args=(process.stderr, lines), daemon=True).start()
        running = None
        while True:
            try:
                line = lines.get(timeout=rng.uniform(0.05, LATEST_S) if running else None)
            except queue.Empty:
                process.send_signal(signal.SIGKILL)
                return running, reused
            if line is None:
                break
            if match := REUSED.fullmatch(line.strip()):
                reused.append(match[1])
            match = BEGUN.fullmatch(line.strip())
            running = match[1] if match and match[1] not in killed else None
    if process.returncode:
        raise SystemExit(f"the export failed with {process.returncode}")
    return None, reused


def listen(stream: Any, lines: queue.Queue[str | None]) -> None:
    """Put each line into the queue, and None at the end."""
    for line in stream:
        lines.put(line)
    lines.put(None)


def main() -> None:
    """Kill, resume, compare."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(command("init", "--preset", PRESET, "-o", folder / CHECKPOINT), check=True)
        chosen = recipe(folder, "xiaomi-14-pro")
        exports = {
            output: command("export", folder / CHECKPOINT, "--recipe", chosen, "--output", folder / output)
            for output in ("disturbed", "calm")
        }
        subprocess.run(exports["calm"], check=True)
        runs: list[dict[str, Any]] = []
        killed: set[str] = set()
        while True:
            stage, reused = run_until_killed(exports["disturbed"], killed, rng)
            runs.append({"killed_in": stage, "found_done": len(reused)})
            print(runs[-1], file=sys.stderr)
            if stage is None:
                break
            killed.add(stage)
        subprocess.run(command("verify", folder / "disturbed"), check=True)
        calm, disturbed = (Artifact.open(folder / output).manifest for output in ("calm", "disturbed"))
        digests = [
            {f"{c.name} {role}": entry.sha256 for c in m.components for role, entry in c.files.items()}
            for m in (calm, disturbed)
        ]
        stages = [name for name in calm.stages if ": " not in name]
        values = {
            "stages": len(stages),
            "killed": len(killed),
            "not_killed": sorted(set(stages) - killed),
            "graphs_equal": digests[0] == digests[1],
            "runs": runs,
        }
    print(write_result("interruptions", values))


if __name__ == "__main__":
    main()
