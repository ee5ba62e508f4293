"""MobileVD's network at 1024x576, which did not fit on the paper's phone: writes results/hd.json.

    python benchmarks/hd.py --work build/hd [--parts 24] [--compile 1 12]

Random weights, float16 for SM8650, attention one head at a time in tiles of 256 queries. The UNet is
rewritten, written as ONNX, linted and cut into parts of about equal work. The parts named by --compile
(numbers from 1, in running order) are compiled in parallel. Mapped memory is the size of the context binary
plus inputs and outputs; for a part that is not compiled, the float16 weights replace the binary. Parity is
checked at 512x256 instead of this size (25 TFLOPs per run); no form depends on the size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from _common import RESULTS, write_result
from cost_growth import rewrite, write
from full_size import run
from parts import TARGET, compile_files

from mobilevd_deploy.base.graphs import read_shaped
from mobilevd_deploy.base.processes import Steps
from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.config.recipe import Recipe, load_recipe
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.npu.onnx_export import MODEL
from mobilevd_deploy.qnn.lint import lint
from mobilevd_deploy.qnn.split import plan_cut, weight_bytes, write_parts

PRESET = "mobilevd-hd"
MAPPED_LIMIT = 3.5e9
"""Bytes that a process may map for the NPU; source: the compiler's setting memory_alloc_limit = 3584 MB."""


def hd_recipe() -> Recipe:
    """Return the float16 recipe for larger maps, whose rows of scores are 4.5 times as long."""
    recipe = load_recipe("xiaomi-14-pro-float16")
    return dataclasses.replace(
        recipe,
        graph=dataclasses.replace(recipe.graph, attention="heads", query_tile=256, whole_up_to=1024),
    )


def values_bytes(model: Path) -> int:
    """Return the bytes of a graph's inputs and outputs in float32."""
    graph = onnx.load(model, load_external_data=False).graph
    sizes = 0
    for value in (*graph.input, *graph.output):
        count = 4
        for dimension in value.type.tensor_type.shape.dim:
            count *= dimension.dim_value
        sizes += count
    return sizes


def mapped(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the memory that a phone maps for the largest part, and for all parts."""
    sizes = [row.get("binary_bytes", row["weights_bytes"]) + row["values_bytes"] for row in rows]
    return {"mapped": {"largest_part": max(sizes), "whole": sum(sizes), "limit": MAPPED_LIMIT}}


def main() -> None:
    """Measure, and write the result after each compiled part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint and graphs; it stays")
    parser.add_argument("--parts", type=int, default=24)
    parser.add_argument("--compile", type=int, nargs="*", default=[], metavar="PART")
    parser.add_argument("--note", default="", help="other load of the machine, for the result")
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    drawn, recipe = work / "drawn.safetensors", hd_recipe()
    run(work, "init", "init", "--preset", PRESET, "-o", str(drawn))
    model = work / "float" / MODEL
    with make_progress() as progress:
        steps = Steps(True, progress)
        checkpoint = open_checkpoint(drawn)
        if not (work / "unet.safetensors").exists():
            steps.run("rewrite", rewrite, checkpoint, recipe, work)
        progress.begin("write")
        parameters, flops, nodes = steps.run("write", write, checkpoint.spec, recipe, work)
        progress.end()
        whole = read_shaped(model)
        cut = plan_cut(whole, options.parts)
        files = write_parts(model, cut)
        rows: list[dict[str, Any]] = []
        for file, part in zip(files, cut.parts, strict=True):
            weights = weight_bytes(onnx_ir.load(file), float_bytes=2)
            rows.append(
                {"nodes": len(part.nodes), "weights_bytes": weights, "values_bytes": values_bytes(file)}
            )
        findings = Counter(finding.rule for finding in lint(model, float16=True))
        path = RESULTS / "hd.json"
        before = (
            json.loads(path.read_bytes())["steps"] if path.exists() else {}
        )  # later runs reuse the rewritten weights
        result = {
            "preset": PRESET,
            "target": TARGET,
            "precision": "float16",
            "forms": dataclasses.asdict(recipe.graph),
            "weights": "drawn, not trained",
            "note": options.note,
            "steps": before | {name: dataclasses.asdict(cost) for name, cost in steps.costs.items()},
            "parameters": parameters,
            "tflops": round(flops / 1e12, 3),
            "nodes": nodes,
            "lint": dict(findings),
            "crossing_bytes": cut.crossing_bytes,
            "parts": rows,
        }
        progress.begin("compile")
        assert recipe.npu is not None

        def keep(i: int, row: dict[str, Any]) -> None:
            rows[options.compile[i] - 1] |= row
            write_result("hd", result | mapped(rows))

        compile_files([files[number - 1] for number in options.compile], recipe.npu, 2, keep)
        progress.end()
        print(write_result("hd", result | mapped(rows)))


if __name__ == "__main__":
    main()
