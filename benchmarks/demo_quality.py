"""Quality of the demo's clips, on seeds outside of its training set: writes results/demo_quality.json.

    python benchmarks/demo_quality.py --artifact build/demo/artifact [--clips 200]
    python benchmarks/demo_quality.py --artifact build/demo/npu --provider quantised
    python benchmarks/demo_quality.py --artifact build/demo/npu --provider npu-sim --clips 12

With --provider, the float graphs make the same clips, and both are scored in
results/demo_quality_<provider>.json. The simulator takes 15 s per clip.

The artifact makes a clip from the first frame of each held-out clip. Frames 2 to 14 are compared with the
truth; the baseline repeats the first frame. Takes one minute on two cores. Without --provider it also writes
the manual's contact sheet (generated above truth) and animation: results/demo_sheet.png and
results/demo_clip.gif.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import RESULTS, write_result

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.runtime.media import enlarge, to_uint8, write_clip, write_sheet
from mobilevd_deploy.runtime.pipeline import Pipeline
from mobilevd_deploy.synthetic.clips import HELD_OUT, DrawnClip, make_clip
from mobilevd_deploy.training.quality import score, summarise

SEED = 0  # of the clips; clip i gets noise seed i
SHOWN = 6  # clips in the pictures, the first ones: not chosen for their looks
MOMENTS = (0, 3, 6, 9, 13)  # frames in the contact sheet


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--provider", choices=("quantised", "npu-sim"))
    arguments = parser.parse_args()

    artifact = Artifact.open(arguments.artifact)
    clips = [make_clip(SEED, HELD_OUT + i) for i in range(arguments.clips)]
    made, values = measure(Pipeline.open(artifact), clips)
    manifest = artifact.manifest
    held_out = {"stream": SEED, "first_index": HELD_OUT, "clips": len(clips)}
    source = {"model": manifest.model["name"], "checkpoint_sha256": manifest.source.sha256}
    result: dict[str, Any] = {"artifact": source, "held_out": held_out, "values": values}
    if arguments.provider is None:
        write_result("demo_quality", result)
        write_pictures(clips[:SHOWN], made[:SHOWN])
        return
    _, quantised = measure(Pipeline.open(artifact, (arguments.provider,)), clips)
    result |= {"precision": manifest.components[0].npu[0].precision, arguments.provider: quantised}
    result["psnr_lost_db"] = round(values["psnr_db"] - quantised["psnr_db"], 4)
    write_result(f"demo_quality_{arguments.provider.replace('-', '_')}", result)


def measure(
    pipeline: Pipeline, clips: list[DrawnClip]
) -> tuple[list[npt.NDArray[np.float32]], dict[str, float]]:
    """Make the clips from their first frames, score them, print."""
    made = pipeline.generate_all((picture(clip), i) for i, clip in enumerate(clips))
    scores = [score(clip, to_uint8(frames)) for clip, frames in zip(clips, made, strict=True)]
    values = summarise(scores)
    for name, value in values.items():
        print(f"{name:36}{value:10.3f}")
    return made, values


def picture(clip: DrawnClip) -> npt.NDArray[np.float32]:
    """Return the first frame as the pipeline takes it: (1, 3, H, W) in [-1, 1]."""
    return (clip.frames[:1].transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)


def write_pictures(clips: list[DrawnClip], made: list[npt.NDArray[np.float32]]) -> None:
    """Write demo_sheet.png, and demo_clip.gif: four clips at twice their size."""
    rows: list[tuple[str, npt.NDArray[np.uint8]]] = []
    for clip, frames in zip(clips, made, strict=True):
        chosen = list(MOMENTS)
        rows.append(("", np.concatenate([clip.frames[:1], to_uint8(frames[chosen])])))
        rows.append(("", np.concatenate([clip.frames[:1], clip.frames[chosen]])))
    moments = ", ".join(str(moment + 1) for moment in MOMENTS)
    rows[0] = (f"input; then frames {moments}: generated above truth", rows[0][1])
    write_sheet(rows, RESULTS / "demo_sheet.png")
    halves = [np.concatenate(made[side:4:2], axis=2) for side in (0, 1)]
    write_clip(enlarge(np.concatenate(halves, axis=3), 2), RESULTS / "demo_clip.gif", fps=7)


if __name__ == "__main__":
    main()
