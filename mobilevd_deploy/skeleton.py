"""A model's UNet without weights: built and rewritten on the meta device, in seconds at any size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from mobilevd_deploy.components import DenoiseStep, build_component, deploy_contract, input_shapes
from mobilevd_deploy.passes import select_passes
from mobilevd_deploy.spec import ModelSpec
from mobilevd_deploy.unet import MobileVDUNet


@torch.no_grad()
def rewritten_skeleton(spec: ModelSpec, rewrites: Iterable[str]) -> tuple[DenoiseStep, list[Tensor]]:
    """Return the one-step map after these rewrites, and inputs to call it with; all on the meta device."""
    with torch.device("meta"):
        step = cast(DenoiseStep, deploy_contract(build_component(spec, "unet")))
        inputs = [torch.empty(shape) for shape in input_shapes(spec, "unet").values()]
    unet = cast(MobileVDUNet, step.unet)
    for rewrite in select_passes(tuple(rewrites)):
        rewrite.requires(unet)
        rewrite.apply(unet)
    return step, inputs
