"""Fold EDM preconditioning into the network."""

from __future__ import annotations

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.model.unet import MobileVDUNet, Preconditioning


class FoldPreconditioning:
    """Fold c_out into the last convolution. c_in cancels for unit noise; c_skip remains as one addition.

        before  c_skip x + c_out F(c_in x), x = sqrt(sigma^2 + 1) n
        after   skip n + F'(n), conv_out' = c_out conv_out, skip = c_skip sqrt(sigma^2 + 1)

    With unit noise n, c_in x = n, so the network's input needs no scaling.
    Source: Karras et al. 2022, table 1; `StepSpec` gives the formulas.
    """

    name: PassName = "fold-preconditioning"

    def requires(self, unet: MobileVDUNet) -> None:
        """Require nothing: conv_out is affine, so the fold is always exact."""

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Scale conv_out."""
        skip, c_out = unet.preconditioning
        if c_out == 1:
            return ()
        unet.conv_out.weight.mul_(c_out)
        unet.conv_out.bias.mul_(c_out)
        unet.preconditioning = Preconditioning(skip, 1.0)
        return ("conv_out",)
