"""The paper's UNet as context binaries: whole or in parts, W8A16 or float16: adds to results/parts.json.

    python benchmarks/parts.py --artifact build/full/artifact --precision w8a16 --parts 4 [--mode 0]

The graphs come from an artifact that `full_size.py --keep` made. Parts are compiled in parallel, as in an
export. A row has the total time and, for each part, the compiler's memory, its expected maximum
(`split.compiler_bytes`), the size of the binary, and the DRAM traffic of a run by the compiler's own sum.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _common import RESULTS, write_result

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.base.graphs import read_shaped
from mobilevd_deploy.base.processes import memory_bytes, side_by_side
from mobilevd_deploy.config.recipe import NpuOptions
from mobilevd_deploy.errors import MobileVDError
from mobilevd_deploy.qnn.compiler import compile_context
from mobilevd_deploy.qnn.split import compiler_bytes, compiler_work, plan_cut, write_parts
from mobilevd_deploy.qnn.targets import find_target

NAME, TARGET = "parts", "SM8650"
ROLES = {"w8a16": ("quantised", 4), "float16": ("model", 2)}
"""Of a precision: the graph's role in the artifact, and bytes of a float in the binary."""


def compile_files(
    files: Sequence[Path],
    options: NpuOptions,
    float_bytes: int,
    keep: Callable[[int, dict[str, Any]], None] = lambda number, row: None,
) -> list[dict[str, Any]]:
    """Compile graphs in parallel; return the cost of each, and its result or its error.

    `float_bytes`: 2 for graphs that are computed in float16, 4 for quantised ones. `keep` receives each row
    when it is finished, with the file's index.
    """

    lock = threading.Lock()

    def compile_one(i: int, file: Path, expected: int, folder: Path, stop: threading.Event) -> dict[str, Any]:
        row = {"expected_peak_bytes": expected} | compile_or_say(file, folder, stop)
        with lock:
            keep(i, row)
        return row

    def compile_or_say(file: Path, folder: Path, stop: threading.Event) -> dict[str, Any]:
        float16 = float_bytes == 2
        try:
            made = compile_context(file, folder, find_target(TARGET), options, float16=float16, stop=stop)
        except MobileVDError as error:
            return {"error": error.what.replace(str(file.parent), "")}
        return {
            "seconds": round(made.seconds, 1),
            "peak_bytes": made.peak_bytes,
            "binary_bytes": made.bytes,
            "dram_read": made.dram.read if made.dram else None,
            "dram_written": made.dram.written if made.dram else None,
        }

    graphs = [read_shaped(f) for f in files]
    expected = [compiler_bytes(graph, float_bytes) for graph in graphs]
    with tempfile.TemporaryDirectory() as name:
        tasks = [
            functools.partial(compile_one, i, file, peak, Path(name) / str(i))
            for i, (file, peak) in enumerate(zip(files, expected, strict=True))
        ]
        work = [compiler_work(graph) for graph in graphs]
        return side_by_side(tasks, expected, work, budget=memory_bytes()[1], workers=os.cpu_count() or 1)


def main() -> None:
    """Cut, compile, and add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--precision", choices=ROLES, required=True)
    parser.add_argument("--parts", type=int, required=True)
    parser.add_argument("--mode", type=int, default=0, choices=range(4), help="optimisation mode")
    parser.add_argument("--note", default="", help="other load of the machine, for the result")
    options = parser.parse_args()
    artifact, npu = Artifact.open(options.artifact), NpuOptions(targets=(TARGET,))
    npu = dataclasses.replace(npu, optimization_mode=options.mode)
    (unet,) = (c for c in artifact.manifest.components if c.name == "unet")
    role, float_bytes = ROLES[options.precision]
    model = artifact.path(unet, role)
    whole = read_shaped(model)
    cut = plan_cut(whole, options.parts)
    files = write_parts(model, cut) if options.parts > 1 else (model,)
    begun = time.monotonic()
    rows = compile_files(files, npu, float_bytes)
    path = RESULTS / f"{NAME}.json"
    kept: dict[str, Any] = json.loads(path.read_bytes())["rows"] if path.exists() else {}
    kept[f"{options.precision}, mode {options.mode}, {options.parts} parts"] = {
        "seconds": round(time.monotonic() - begun, 1),
        "crossing_bytes": cut.crossing_bytes,
        "dram_bytes": sum(row["dram_read"] + row["dram_written"] for row in rows if "error" not in row),
        "parts": rows,
        "note": options.note,
    }
    print(write_result(NAME, {"preset": artifact.manifest.model["name"], "target": TARGET, "rows": kept}))
    for file in set(files) - {model}:
        file.unlink()


if __name__ == "__main__":
    main()
