"""The components' interface: their names, inputs and outputs. Without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.config.strict import NAME, require_match
from mobilevd_deploy.errors import SpecError

_SOURCE = re.compile(rf"image|noise:(0|[1-9][0-9]{{0,8}})|component:{NAME.pattern}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component.

    `layout` has one letter per axis: N (1, or the frames), C, H, W. `range` is what the values keep to,
    None where they have no bounds. `source` says who provides an input: "image" (the picture, as
    `PipelineSpec` describes it), "noise:<stream>" (unit noise of that stream), or "component:<name>" (the
    output of that component, which runs before); it is None for outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16"]
    layout: str
    range: tuple[float, float] | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise SpecError("a tensor has an empty name")
        if not self.shape or min(self.shape) < 1:
            raise SpecError(f"tensor {self.name}: shape {list(self.shape)} is not all positive")
        if len(self.layout) != len(self.shape) or set(self.layout) - set("NCHW"):
            raise SpecError(
                f"tensor {self.name}: layout {self.layout!r} does not name {len(self.shape)} axes"
            )
        if self.range is not None and not self.range[0] < self.range[1]:
            raise SpecError(f"tensor {self.name}: range {list(self.range)} is empty")
        if self.source is not None:
            require_match(_SOURCE, self.source, f"tensor {self.name}: source")


# In running order: each reads the picture, the noise, or what an earlier one returned.
COMPONENTS: tuple[ComponentName, ...] = ("image_encoder", "vae_encoder", "unet", "decoder")


def input_shapes(spec: ModelSpec, name: ComponentName) -> dict[str, tuple[int, ...]]:
    """Return the inputs of a component in calling order, each with its shape; all are float tensors."""
    return {tensor.name: tensor.shape for tensor in component_tensors(name, spec)[0]}


def component_tensors(
    name: ComponentName, spec: ModelSpec
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs of a component: float32, NCHW (embeddings NC), ranges where bounded."""
    frames, (h, w), embedding = spec.frames, spec.latent_size, spec.unet.cross_attention_dim
    picture, pixels = (1, 3, spec.height, spec.width), (-1.0, 1.0)
    image = TensorSpec("image", picture, "float32", "NCHW", pixels, "image")

    def latents(name: str, frames: int, source: str | None) -> TensorSpec:
        return TensorSpec(name, (frames, 4, h, w), "float32", "NCHW", None, source)

    def embeds(source: str | None) -> TensorSpec:
        return TensorSpec("image_embeds", (1, embedding), "float32", "NC", None, source)

    if name == "image_encoder":
        return (image,), (embeds(None),)
    if name == "vae_encoder":
        noise = TensorSpec("image_noise", picture, "float32", "NCHW", None, "noise:1")
        return ((image, noise) if spec.step.noise_aug_strength else (image,)), (
            latents("image_latents", 1, None),
        )
    if name == "unet":
        return (
            latents("noise", frames, "noise:0"),
            latents("image_latents", 1, "component:vae_encoder"),
            embeds("component:image_encoder"),
        ), (latents("latents", frames, None),)
    clip = TensorSpec("frames", (frames, 3, spec.height, spec.width), "float32", "NCHW", pixels)
    return (latents("latents", frames, "component:unet"),), (clip,)
