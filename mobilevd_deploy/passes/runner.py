"""Run rewrites, and prove each against outputs captured before the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mobilevd_deploy.artifact.manifest import PassReport
from mobilevd_deploy.base.tensors import sqnr_db
from mobilevd_deploy.errors import RewriteError, UsageError
from mobilevd_deploy.model.flops import count_flops
from mobilevd_deploy.model.unet import MobileVDUNet
from mobilevd_deploy.passes.base import Pass
from mobilevd_deploy.passes.drop_temporal_blocks import DropTemporalBlocks
from mobilevd_deploy.passes.fold_channel_funnels import FoldChannelFunnels
from mobilevd_deploy.passes.fold_preconditioning import FoldPreconditioning
from mobilevd_deploy.passes.fold_single_step import FoldSingleStep
from mobilevd_deploy.passes.single_token_cross_attention import StripCrossAttention
from mobilevd_deploy.passes.subpixel_upsampling import SubPixelUpsampling

PASSES: tuple[Pass, ...] = (
    FoldChannelFunnels(),
    StripCrossAttention(),
    DropTemporalBlocks(),
    FoldSingleStep(),
    FoldPreconditioning(),
    SubPixelUpsampling(),
)


@dataclass(frozen=True)
class UNetProbe:
    """Fixed inputs of `MobileVDUNet.denoise`: noise (B, T, 4, h, w), latents (B, 4, h, w), embeds (B, D)."""

    noise: Tensor
    image_latents: Tensor
    image_embeds: Tensor

    @classmethod
    def make(cls, unet: MobileVDUNet, height: int, width: int, seed: int = 0, batch: int = 1) -> UNetProbe:
        """Draw standard normal inputs for latents of this size, in the network's dtype."""
        generator = torch.Generator().manual_seed(seed)
        spec, dtype = unet.unet_spec, unet.dtype
        shapes = (
            (batch, unet.config.num_frames, spec.out_channels, height, width),
            (batch, spec.in_channels - spec.out_channels, height, width),
            (batch, spec.cross_attention_dim),
        )
        return cls(
            *(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
        )

    @torch.no_grad()
    def run(self, unet: MobileVDUNet) -> Tensor:
        """Return the network's denoised latents on these inputs."""
        return unet.denoise(self.noise, self.image_latents, self.image_embeds)


def select_passes(names: Iterable[str]) -> tuple[Pass, ...]:
    """Return the named passes in running order; UsageError for an unknown name."""
    wanted = set(names)
    if unknown := sorted(wanted - {p.name for p in PASSES}):
        raise UsageError(
            f"no pass {unknown[0]!r}", next_step="passes are " + ", ".join(p.name for p in PASSES)
        )
    return tuple(p for p in PASSES if p.name in wanted)


def run_passes(
    unet: MobileVDUNet, passes: Iterable[Pass], probe: UNetProbe, floor_db: float
) -> tuple[PassReport, ...]:
    """Apply `passes` in place; prove each on `probe`. FLOPs are counted at the probe's size.

    Raises RewriteError if a pass's condition is not met, or if the SQNR of the outputs, relative to the
    network before the first pass, is below `floor_db`. The error names the pass and those that ran before it.
    """
    params = _parameters(unet)
    reference, flops = _measure(unet, probe)
    if not np.isfinite(reference).all():
        raise RewriteError(
            "the network's outputs are not finite before any rewrite", next_step="check the weights"
        )
    reports: list[PassReport] = []
    for step in passes:
        ran = ", ".join(r.name for r in reports) or "none"
        try:
            step.requires(unet)
        except RewriteError as error:
            raise RewriteError(
                f"{step.name}: {error.what} (ran before: {ran})", next_step=error.next_step
            ) from None
        with torch.no_grad():
            changed = step.apply(unet)
        params_after = _parameters(unet)
        outputs, flops_after = _measure(unet, probe)
        drift = sqnr_db(reference, outputs)
        if not drift >= floor_db:
            raise RewriteError(
                f"{step.name} changed the outputs: {drift:.1f} dB SQNR relative to the original network, "
                f"the floor is {floor_db:g} dB (ran before: {ran})",
                next_step="the rewrite is exact up to rounding: look for weights of extreme scale, or report "
                "this as a bug",
            )
        reports.append(PassReport(step.name, changed, params, params_after, flops, flops_after, drift))
        params, flops = params_after, flops_after
    return tuple(reports)


def _parameters(unet: MobileVDUNet) -> int:
    return sum(p.numel() for p in unet.parameters())


def _measure(unet: MobileVDUNet, probe: UNetProbe) -> tuple[npt.NDArray[np.generic], int]:
    """Return the outputs on the probe, and the FLOPs of the run."""
    outputs: list[Tensor] = []
    flops = count_flops(lambda: outputs.append(probe.run(unet)))
    return outputs[0].numpy(), flops
