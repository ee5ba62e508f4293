"""SVD's temporal decoder, 14 frames of 512x256, as a context binary: adds to results/temporal_decoder.json.

    python benchmarks/temporal_decoder.py --precision float16 [--parts 12] [--only 1] [--frames 14]

MobileVD's presets have a TAESD-type decoder; models that keep SVD's decoder compile this one. Weights are
random and keep the signal's scale. The ranges of W8A16 come from two frames, because no schedule depends on
them. `--only`: compile these parts (numbers from 1). Mapped memory is counted as in hd.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from _common import RESULTS, write_result
from hd import mapped, values_bytes
from parts import TARGET, compile_files

from mobilevd_deploy.base.graphs import read_shaped
from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.model.interface import input_shapes
from mobilevd_deploy.npu.onnx_export import MODEL, export_onnx, read_graph
from mobilevd_deploy.npu.skeleton import deploy_skeleton
from mobilevd_deploy.profiling.traffic import randomised
from mobilevd_deploy.qnn.lint import lint
from mobilevd_deploy.qnn.split import plan_cut, weight_bytes, write_parts
from mobilevd_deploy.quantize.simulation import quantise

NAME, PRESET = "temporal_decoder", "svd-lowres"
RECIPES = {"float16": "xiaomi-14-pro-float16", "w8a16": "xiaomi-14-pro"}


def main() -> None:
    """Write the graph, cut and compile it, and add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", choices=RECIPES, default="float16")
    parser.add_argument("--frames", type=int, default=14)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", metavar="PART")
    parser.add_argument("--note", default="", help="other load of the machine, for the result")
    options = parser.parse_args()
    recipe = load_recipe(RECIPES[options.precision])
    spec = dataclasses.replace(load_preset(PRESET).model, frames=options.frames)
    with tempfile.TemporaryDirectory() as name, make_progress() as progress:
        folder = Path(name)
        progress.begin("write")
        network = randomised(deploy_skeleton("decoder", spec, recipe))
        shapes, rng = input_shapes(spec, "decoder"), np.random.default_rng(0)
        inputs: Tensors = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
        if recipe.quant is None:
            export_onnx(network, inputs, ["frames"], folder, recipe.onnx)
        else:
            two = {n: value[:2] for n, value in inputs.items()}
            quantise(network, [two], recipe.quant.of("decoder")).export(folder, inputs, ["frames"])
        del network
        model = folder / MODEL
        graph = read_graph(model)
        progress.end()
        files = [model]
        if options.parts > 1:
            whole = read_shaped(model)
            files = list(write_parts(model, plan_cut(whole, options.parts)))
        rows: list[dict[str, Any]] = []
        for file in files:
            weights = weight_bytes(onnx_ir.load(file), 1 if recipe.quant else 2)
            rows.append({"weights_bytes": weights, "values_bytes": values_bytes(file)})
        found = {
            "precision": options.precision,
            "frames": options.frames,
            "forms": dataclasses.asdict(recipe.graph),
            "note": options.note,
            "parameters": graph.parameters,
            "tflops": round(graph.flops / 1e12, 3),
            "nodes": sum(graph.ops.values()),
            "lint": dict(Counter(finding.rule for finding in lint(model, float16=recipe.quant is None))),
            "parts": rows,
        }
        path = RESULTS / f"{NAME}.json"
        kept = json.loads(path.read_bytes())["rows"] if path.exists() else {}
        key = f"{options.precision}, {options.frames} frames, {options.parts} parts"
        numbers = options.only or range(1, len(files) + 1)
        progress.begin("compile")
        assert recipe.npu is not None
        made = compile_files([files[n - 1] for n in numbers], recipe.npu, 4 if recipe.quant else 2)
        progress.end()
        for number, row in zip(numbers, made, strict=True):
            rows[number - 1] |= row
        kept[key] = found | mapped(rows)
        print(write_result(NAME, {"preset": PRESET, "target": TARGET, "weights": "random", "rows": kept}))


if __name__ == "__main__":
    main()
