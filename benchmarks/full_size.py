"""The paper's network from an empty folder to context binaries: time, peak memory, size of each stage.

    python benchmarks/full_size.py --work build/full --note "machine otherwise idle"
    python benchmarks/full_size.py --preset benchmarks/small.toml --work build/small --result small

No weights of MobileVD are public, so they are random (`mobilevd-deploy init`). Sizes, FLOPs, memory,
operators and times do not depend on training. Quality does, so the floors of components and clip are 0 dB,
and the floor of the conditioning is 0.01. The floor between AIMET and onnxruntime is 0 dB too: random weights
amplify a difference in the last of 16 bits to 46 dB. One picture calibrates and one judges. An interrupted
run resumes, and finished stages keep their recorded cost. The work folder is removed at the end unless --keep
is given. Writes results/full_size.json (another name with --result).
--parts N cuts the UNet into N context binaries. --second-target exports for another chip afterwards and
reuses the calibrated and quantised graphs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import write_result

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.model.checkpoint import open_checkpoint

CHECKPOINT = "start.safetensors"


def run(folder: Path, name: str, *arguments: str) -> dict[str, float]:
    """Run the command line in its own process; return its wall time and peak memory, which a file keeps.

    Raises SystemExit with its output if it failed.
    """
    kept = folder / f"{name}.json"
    if kept.exists():
        return dict(json.loads(kept.read_bytes()))
    begun = time.monotonic()
    command = [sys.executable, "-m", "mobilevd_deploy", *arguments]
    with subprocess.Popen(command) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with {process.returncode}")
    cost = {"seconds": round(time.monotonic() - begun, 1), "peak_bytes": usage.ru_maxrss * 1024}
    kept.write_text(json.dumps(cost))
    return cost


def recipe(folder: Path, name: str) -> Path:
    """Write a shipped recipe with one calibration picture and without quality floors."""
    quality = ("quantised_sqnr_db", "simulator_db", "clip_psnr_db")
    changes = {"samples": 1, "conditioning": 0.01} | dict.fromkeys(quality, 0.0)
    lines = (data_dir("export") / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    changed = [
        f"{key} = {changes[key]}" if (key := line.partition(" =")[0]) in changes else line for line in lines
    ]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(changed) + "\n", encoding="utf-8")
    return path


def describe(artifact: Artifact, checkpoint: Path) -> dict[str, Any]:
    """Return costs, sizes, FLOPs, drifts and binaries from the manifest."""
    manifest = artifact.manifest
    training = open_checkpoint(checkpoint).parameters
    return {
        "stages": {name: dataclasses.asdict(cost) for name, cost in manifest.stages.items()},
        "drift": manifest.drift,
        "clip_psnr_db": manifest.quality.clip_psnr_db if manifest.quality else None,
        "conditioning": manifest.quality.conditioning if manifest.quality else None,
        "training_parameters": training,
        "training_float32_bytes": {name: 4 * count for name, count in training.items()},
        "components": {
            c.name: {
                "parameters": c.parameters,
                "tflops": c.flops / 1e12,
                "nodes": sum(c.ops.values()),
                "files_bytes": {role: entry.bytes for role, entry in c.files.items()},
                "binaries": [
                    {
                        "target": b.target,
                        "arch": b.arch,
                        "precision": b.precision,
                        "sdk": b.sdk,
                        "parts_bytes": [part.files["context"].bytes for part in b.parts],
                        "parts_dram_bytes": [[part.dram_read, part.dram_written] for part in b.parts],
                    }
                    for b in c.npu
                ],
            }
            for c in manifest.components
        },
        "loaded_at_once_bytes": max(
            part.files["context"].bytes for c in manifest.components for b in c.npu for part in b.parts
        ),
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="mobilevd")
    parser.add_argument("--recipe", default="xiaomi-14-pro")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint and artifact")
    parser.add_argument("--result", default="full_size")
    parser.add_argument("--note", default="", help="other load of the machine, for the result")
    parser.add_argument("--parts", type=int, help="context binaries of the UNet")
    parser.add_argument("--second-target", help="another chip, such as SM8750")
    parser.add_argument("--keep", action="store_true", help="leave the work folder")
    options = parser.parse_args()
    folder: Path = options.work
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, output = folder / CHECKPOINT, folder / "artifact"
    init = run(folder, "init", "init", "--preset", options.preset, "-o", str(checkpoint))
    chosen = recipe(folder, options.recipe)
    arguments = ["export", str(checkpoint), "--recipe", str(chosen), "--output", str(output)]
    arguments += ["--parts", str(options.parts)] if options.parts else []
    export = run(folder, "export", *arguments)
    values = {
        "preset": options.preset,
        "recipe": options.recipe,
        "weights": "drawn, not trained",
        "note": options.note,
        "parts": options.parts,
        "init": init | {"bytes": checkpoint.stat().st_size},
        "export": export,
        **describe(Artifact.open(output), checkpoint),
    }
    if options.second_target:
        again = run(folder, "second", *arguments, "--target", options.second_target)
        made = describe(Artifact.open(output), checkpoint)["stages"]
        anew = [name for name, cost in made.items() if values["stages"].get(name) != cost]
        values["second_target"] = {"target": options.second_target, **again, "stages_made_anew": anew}
    print(write_result(options.result, values))
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
