"""How time and memory of an export grow with parameters, frames and pixels: writes results/cost_growth.json.

    python benchmarks/cost_growth.py [--only "14 frames" ...]

The UNet of benchmarks/midsize.toml with random weights, at three widths, three lengths and three sizes; one
of them changes at a time. Each step runs in its own process: rewrite, write ONNX, quantise (AIMET, one
sample, QDQ graph), compile (SM8650, W8A16, the shipped recipe).
--only: measure these rows and add them to the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _common import RESULTS, write_result

from mobilevd_deploy.base.processes import StageCost, Steps
from mobilevd_deploy.base.progress import Progress, make_progress
from mobilevd_deploy.base.tensors import Tensors
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import Recipe, load_recipe
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint, read_weights, write_weights
from mobilevd_deploy.model.interface import input_shapes
from mobilevd_deploy.npu.onnx_export import DATA, MODEL, export_onnx, read_graph
from mobilevd_deploy.npu.skeleton import deploy_skeleton
from mobilevd_deploy.qnn.compiler import compile_context
from mobilevd_deploy.qnn.targets import find_target
from mobilevd_deploy.quantize.simulation import quantise
from mobilevd_deploy.stages.export import deploy_form
from mobilevd_deploy.training.initialise import draw_checkpoint

WEIGHTS = "unet.safetensors"


def sizes() -> dict[str, ModelSpec]:
    """Return the networks, the middle one first. Other components are small and not measured."""
    demo, middle = load_preset("demo").model, load_preset(Path(__file__).with_name("midsize.toml")).model
    base = dataclasses.replace(
        demo,
        name="middle",
        frames=8,
        height=128,
        width=256,
        unet=middle.unet,
        image_encoder=dataclasses.replace(demo.image_encoder, projection_dim=256),
    )

    def widths(*channels: int) -> ModelSpec:
        heads = tuple(c // 64 for c in channels)
        unet = dataclasses.replace(base.unet, block_out_channels=channels, num_attention_heads=heads)
        return dataclasses.replace(base, unet=unet)

    return {
        "middle": base,
        "widths x 0.5": widths(64, 128, 256, 256),
        "widths x 1.5": widths(192, 384, 640, 640),
        "4 frames": dataclasses.replace(base, frames=4),
        "14 frames": dataclasses.replace(base, frames=14),
        "128x64 pixels": dataclasses.replace(base, height=64, width=128),
        "384x192 pixels": dataclasses.replace(base, height=192, width=384),
    }


def feeds(spec: ModelSpec) -> Tensors:
    """Draw inputs."""
    rng = np.random.default_rng(0)
    shapes = input_shapes(spec, "unet")
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def rewrite(checkpoint: Checkpoint, recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Apply the rewrites, prove each, and save the weights."""
    network, _ = deploy_form("unet", checkpoint.load("unet"), checkpoint.spec, recipe, progress)
    write_weights(folder / WEIGHTS, network)


def write(spec: ModelSpec, recipe: Recipe, folder: Path, _: Progress) -> tuple[int, int, int]:
    """Write float ONNX; return parameters, FLOPs and nodes."""
    network = deploy_skeleton("unet", spec, recipe)
    read_weights(folder / WEIGHTS, network)
    export_onnx(network, feeds(spec), ["latents"], folder / "float", recipe.onnx)
    graph = read_graph(folder / "float" / MODEL)
    return graph.parameters, graph.flops, sum(graph.ops.values())


def quantise_and_write(spec: ModelSpec, recipe: Recipe, folder: Path, _: Progress) -> int:
    """Calibrate with one sample and write the QDQ graph; return its bytes."""
    assert recipe.quant is not None
    network = deploy_skeleton("unet", spec, recipe)
    read_weights(folder / WEIGHTS, network)
    quantise(network, [feeds(spec)], recipe.quant).export(folder, feeds(spec), ["latents"])
    return sum((folder / name).stat().st_size for name in (MODEL, DATA))


def measure(spec: ModelSpec, recipe: Recipe) -> dict[str, Any]:
    """Measure all steps of one network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_checkpoint(folder / "drawn.safetensors", spec)
        checkpoint = open_checkpoint(folder / "drawn.safetensors")
        steps = Steps(True, Progress())
        steps.run("rewrite", rewrite, checkpoint, recipe, folder)
        parameters, flops, nodes = steps.run("write", write, spec, recipe, folder)
        quantised = steps.run("quantise", quantise_and_write, spec, recipe, folder)
        assert recipe.npu is not None
        made = compile_context(folder / MODEL, folder, find_target("SM8650"), recipe.npu, float16=False)
        costs = steps.costs | {"compile": StageCost(round(made.seconds, 1), made.peak_bytes)}
    return {
        "training_float32_bytes": 4 * checkpoint.parameters["unet"],
        "parameters": parameters,
        "gflops": round(flops / 1e9, 1),
        "nodes": nodes,
        "quantised_bytes": quantised,
        "binary_bytes": made.bytes,
        "steps": {step: dataclasses.asdict(cost) for step, cost in costs.items()},
    }


def main() -> None:
    """Measure, and write the result after each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--note", default="", help="other load of the machine, for the result")
    every = sizes()
    parser.add_argument("--only", nargs="*", choices=every, default=[*every], metavar="ROW")
    options = parser.parse_args()
    path = RESULTS / "cost_growth.json"
    with make_progress() as progress:
        progress.plan(dict.fromkeys(options.only, 1.0))
        for name in options.only:
            progress.begin(name)
            row = measure(every[name], load_recipe("xiaomi-14-pro")) | {"note": options.note}
            kept = json.loads(path.read_bytes())["rows"] if path.exists() else {}
            write_result("cost_growth", {"weights": "drawn, not trained", "rows": kept | {name: row}})
            progress.end()


if __name__ == "__main__":
    # Child processes find the steps by the name of their module.
    importlib.import_module("cost_growth").main()
