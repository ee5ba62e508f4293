"""The paper's UNet as context binaries: whole or in parts, W8A16 or float16: adds to results/parts.json.

    python benchmarks/parts.py --artifact build/full/artifact --precision w8a16 --parts 4 [--mode 0]

The graphs are those of an artifact that `full_size.py --keep` left. Parts are compiled as an export does it:
side by side. A row has the time of all, and for each part what the compiler took, what it was expected to
take at most (`split.compiler_bytes`), the binary, and the bytes that a run moves from and to DRAM by the
compiler's own sum.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import onnx
from _common import RESULTS, write_result

from mobilevd_deploy.apart import memory_bytes, side_by_side
from mobilevd_deploy.artifact import Artifact
from mobilevd_deploy.qnn import ContextBinary, compile_context, find_target
from mobilevd_deploy.recipe import NpuOptions
from mobilevd_deploy.split import compiler_bytes, plan_cut, write_parts

NAME, TARGET = "parts", "SM8650"
ROLES = {"w8a16": ("quantised", 4), "float16": ("model", 2)}
"""Of a precision: the graph's role in the artifact, and bytes of a float in the binary."""


def main() -> None:
    """Cut, compile, and add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--precision", choices=ROLES, required=True)
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--mode", type=int, default=0, choices=range(4), help="optimisation mode")
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    artifact, npu = Artifact.open(options.artifact), NpuOptions(targets=(TARGET,))
    npu = dataclasses.replace(npu, optimization_mode=options.mode)
    (unet,) = (c for c in artifact.manifest.components if c.name == "unet")
    role, float_bytes = ROLES[options.precision]
    model = artifact.path(unet, role)
    whole = onnx.shape_inference.infer_shapes(onnx.load(model, load_external_data=False))
    cut = plan_cut(whole, options.parts)
    files = write_parts(model, cut) if options.parts > 1 else (model,)

    def compile_one(file: Path, folder: Path, stop: threading.Event) -> ContextBinary:
        float16 = options.precision == "float16"
        return compile_context(file, folder, find_target(TARGET), npu, float16=float16, stop=stop)

    graphs = [onnx.shape_inference.infer_shapes(onnx.load(f, load_external_data=False)) for f in files]
    expected = [compiler_bytes(graph, float_bytes) for graph in graphs]
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as name:
            tasks = [functools.partial(compile_one, f, Path(name) / str(i)) for i, f in enumerate(files)]
            made = side_by_side(tasks, expected, budget=memory_bytes()[1], workers=os.cpu_count() or 1)
    finally:
        for file in files[: len(files) if options.parts > 1 else 0]:
            file.unlink()
    path = RESULTS / f"{NAME}.json"
    rows: dict[str, Any] = json.loads(path.read_bytes())["rows"] if path.exists() else {}
    rows[f"{options.precision}, mode {options.mode}, {options.parts} parts"] = {
        "seconds": round(time.monotonic() - begun, 1),
        "crossing_bytes": cut.crossing_bytes,
        "dram_bytes": sum(m.dram.read + m.dram.written for m in made if m.dram),
        "parts": [
            {
                "seconds": round(m.seconds, 1),
                "peak_bytes": m.peak_bytes,
                "expected_peak_bytes": bytes_,
                "binary_bytes": m.bytes,
                "dram_read": m.dram.read if m.dram else None,
                "dram_written": m.dram.written if m.dram else None,
            }
            for m, bytes_ in zip(made, expected, strict=True)
        ],
        "note": options.note,
    }
    result = {"preset": artifact.manifest.model["name"], "target": TARGET, "sdk": made[0].sdk, "rows": rows}
    print(write_result(NAME, result))


if __name__ == "__main__":
    main()
