"""Build the deploy form of a component from its training form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mobilevd_deploy.config.recipe import GraphForms
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.model.components import DenoiseStep
from mobilevd_deploy.npu.decoders import NpuDecoder
from mobilevd_deploy.npu.encoders import NpuImageEncoder, NpuVaeEncoder
from mobilevd_deploy.npu.unet import NpuUNet


@torch.no_grad()
def build_npu(name: ComponentName, component: nn.Module, spec: ModelSpec, forms: GraphForms) -> nn.Module:
    """Build the deploy form of one component, at the sizes of `spec` and in the recipe's graph forms.

    Its inputs are those of `model.interface.input_shapes`. Weights are shared with `component` unless they
    are folded.

    Args:
        name: which of the four networks `component` is.
        component: a result of `build_component`. A UNet must have gone through the passes, and may be
            wrapped by `deploy_contract`.
        spec: the model that the component was built from.
        forms: the graph forms of a recipe.

    Raises:
        RewriteError: a pass that the UNet's deploy form requires has not run.
    """
    source: Any = component.unet if isinstance(component, DenoiseStep) else component
    if name == "unet":
        return NpuUNet(source, spec.frames, *spec.latent_size, forms).eval()
    builders = {"image_encoder": NpuImageEncoder, "vae_encoder": NpuVaeEncoder, "decoder": NpuDecoder}
    return builders[name](source, spec, forms).eval()
