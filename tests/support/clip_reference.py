"""Clips by Python's pipeline, for the app's tests to be held against.

    python -m tests.support.clip_reference ARTIFACT cpu|npu-sim FOLDER

writes into FOLDER the pictures and, per picture, the clip as little-endian float32; index.json names them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mobilevd_deploy.runtime.media import read_picture
from mobilevd_deploy.runtime.pipeline import Pipeline
from tests.support import ROOT

SEED = 7
DEMO = ROOT / "models" / "demo.png"


def write(artifact: Path, provider: str, folder: Path, pictures: int = 2) -> None:
    """Write `folder`; the second picture has to be resized and cropped."""
    folder.mkdir(parents=True)
    shutil.copy(DEMO, folder / "as-it-is.png")
    larger = Image.open(DEMO).resize((333, 217), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 8, (217, 333, 3))
    pixels = np.clip(np.asarray(larger) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "to-be-resized.png")
    providers = ("CPUExecutionProvider",) if provider == "cpu" else (provider,)
    pipeline = Pipeline.open(artifact, providers)
    spec = pipeline.artifact.manifest.pipeline
    names = ["as-it-is", "to-be-resized"][:pictures]
    images = [read_picture(folder / f"{name}.png", spec.width, spec.height).pixels for name in names]
    for name, clip in zip(names, pipeline.generate_all([(image, SEED) for image in images]), strict=True):
        (folder / f"{name}.f32").write_bytes(clip.astype("<f4").tobytes())
    (folder / "index.json").write_text(json.dumps({"seed": str(SEED), "pictures": names}) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
