"""Accuracy of group norms on onnxruntime's CPU, by elements of a group: writes results/norm_rounding.json.

    python benchmarks/norm_rounding.py                  # norms alone: 2 minutes, 1 GB
    python benchmarks/norm_rounding.py --decoder 14 25  # and SVD's temporal decoder of 128 channels, 5 GB

Every figure is the SQNR in dB of a float32 run against float64 by NumPy or torch. Norms read noise of mean
0.5 and deviation 1. Decoders have random weights and make 128x64 px from 16x8 latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result
from torch import nn

from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.base.tensors import Array, sqnr_db
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import GraphForms, OnnxOptions
from mobilevd_deploy.config.spec import DecoderSpec
from mobilevd_deploy.model.components import build_component, deploy_contract
from mobilevd_deploy.model.interface import input_shapes
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.npu.onnx_export import MODEL, export_onnx
from mobilevd_deploy.npu.ops import InstanceGroupNorm, TwoStepGroupNorm
from mobilevd_deploy.runtime.runners import OnnxRunner

SIZES = (8_192, 65_536, 131_072, 262_144, 524_288, 1_835_008, 3_276_800, 7_340_032, 13_107_200)
CHANNELS = (128, 128, 128, 128)


def main() -> None:
    """Measure, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--decoder", type=int, nargs="*", default=[], metavar="FRAMES")
    options = parser.parse_args()
    with make_progress() as progress:
        progress.plan({"norms": len(SIZES)} | {f"decoder, {n} frames": 10 * n for n in options.decoder})
        progress.begin("norms")
        norms = []
        for size in SIZES:
            norms.append(measure_norms(size))
            progress.advance(len(norms) / len(SIZES))
        progress.end()
        decoders = []
        for frames in options.decoder:
            progress.begin(f"decoder, {frames} frames")
            decoders.append(measure_decoder(frames))
            progress.end()
    for row in (*norms, *decoders):
        print(", ".join(f"{key} {value:,}" for key, value in row.items()))
    print(write_result("norm_rounding", {"norms": norms, "decoders": decoders}))


def measure_norms(size: int) -> dict[str, Any]:
    """Return the SQNR of each form for two groups of `size` elements."""
    x = np.random.default_rng(0).standard_normal((1, 2, size // 256, 256), np.float32) + np.float32(0.5)
    exact = x.astype(np.float64)
    exact -= exact.mean((2, 3), keepdims=True)
    exact /= np.sqrt((exact**2).mean((2, 3), keepdims=True) + 1e-5)
    norm = nn.GroupNorm(2, 2).requires_grad_(False)
    two_step = TwoStepGroupNorm(norm)
    two_step.LIMIT = 0
    forms = {"group": norm, "instance": InstanceGroupNorm(norm), "two_step": two_step}
    found = {form: round(sqnr_db(exact, run(module, x)), 1) for form, module in forms.items()}
    return {"elements": size, **{f"{form}_db": value for form, value in found.items()}}


def measure_decoder(frames: int) -> dict[str, Any]:
    """Return the SQNR of the exported decoder, and of torch in float32."""
    model = load_preset("svd-lowres").model
    spec = dataclasses.replace(
        model, frames=frames, height=64, width=128, decoder=DecoderSpec(block_out_channels=CHANNELS)
    )
    torch.manual_seed(0)
    network = build_component(spec, "decoder").eval().requires_grad_(False)
    latents = np.random.default_rng(0).standard_normal(input_shapes(spec, "decoder")["latents"], np.float32)
    exact = deploy_contract(network.double())(torch.from_numpy(latents).double()).numpy()
    network.float()
    torch_db = sqnr_db(exact, deploy_contract(network)(torch.from_numpy(latents)).numpy())
    found = sqnr_db(exact, run(build_npu("decoder", network, spec, GraphForms()), latents))
    return {"frames": frames, "onnxruntime_db": round(found, 1), "torch_db": round(torch_db, 1)}


def run(module: nn.Module, x: Array) -> Array:
    """Export a module of one input and run the file on onnxruntime's CPU."""
    with tempfile.TemporaryDirectory() as name:
        export_onnx(module.eval(), {"x": x}, ["y"], Path(name), OnnxOptions())
        return OnnxRunner(Path(name) / MODEL).run({"x": x})["y"]


if __name__ == "__main__":
    main()
