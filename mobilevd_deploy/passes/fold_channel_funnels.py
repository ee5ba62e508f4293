"""Fold channel funnels into ordinary, narrower layers."""

from __future__ import annotations

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.errors import RewriteError
from mobilevd_deploy.model.funnels import SqueezedConv, SqueezedLinear, WidenedConv, WidenedLinear
from mobilevd_deploy.model.unet import MobileVDUNet


class FoldChannelFunnels:
    """Merge each funnel into the layers before and after it.

        before  producer -> squeeze (C to rC) -> consumer with widen (rC to C)
        after   producer' ------------------- -> consumer'

    Two affine maps in a row are one: producer' = squeeze @ producer, consumer' = consumer @ widen.
    A widen bias in front of a zero-padded convolution is refused, because it does not apply to the padding.
    Source: MobileVD, channel funnels.
    """

    name: PassName = "fold-channel-funnels"

    def requires(self, unet: MobileVDUNet) -> None:
        """Refuse a widen bias in front of a zero-padded convolution."""
        for path, module in unet.named_modules():
            if isinstance(module, WidenedConv) and not module.foldable:
                raise RewriteError(
                    f"{path}: its widen bias is in front of a zero-padded convolution and cannot be folded",
                    next_step="train this funnel without a widen bias (widen_bias absent)",
                )

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Replace every squeezed or widened layer by its folded form."""
        kinds = (SqueezedLinear, WidenedLinear, SqueezedConv, WidenedConv)
        funnels = {path: module for path, module in unet.named_modules() if isinstance(module, kinds)}
        for path, module in funnels.items():
            unet.set_submodule(path, module.fold())
        return tuple(funnels)
