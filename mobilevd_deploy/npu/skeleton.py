"""Networks without weights: built and rewritten on the meta device, in seconds at any size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.model.components import DenoiseStep, build_component, deploy_contract
from mobilevd_deploy.model.interface import input_shapes
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.npu.build import build_npu
from mobilevd_deploy.passes.runner import select_passes
from mobilevd_deploy.passes.subpixel_upsampling import SubPixelUpsampling


def rewrites(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of all passes for a recipe's UNet: those it lists, and those its graph forms need."""
    return (*recipe.passes, *(SubPixelUpsampling.name,) * (recipe.graph.upsample == "subpixel"))


@torch.no_grad()
def rewritten_skeleton(spec: ModelSpec, names: Iterable[str]) -> tuple[DenoiseStep, list[Tensor]]:
    """Return the one-step network after these rewrites, and example inputs; all on the meta device."""
    with torch.device("meta"):
        step = cast(DenoiseStep, deploy_contract(build_component(spec, "unet")))
        inputs = [torch.empty(shape) for shape in input_shapes(spec, "unet").values()]
    unet = cast(MobileVDUNet, step.unet)
    for rewrite in select_passes(tuple(names)):
        rewrite.requires(unet)
        rewrite.apply(unet)
    return step, inputs


def deploy_skeleton(name: ComponentName, spec: ModelSpec, recipe: Recipe) -> nn.Module:
    """Return a component's deploy form on the meta device."""
    if name == "unet":
        network: nn.Module = rewritten_skeleton(spec, rewrites(recipe))[0]
    else:
        with torch.device("meta"):
            network = build_component(spec, name)
    with torch.device("meta"):
        return build_npu(name, network, spec, recipe.graph)
