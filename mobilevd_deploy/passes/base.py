"""The interface of a rewrite."""

from __future__ import annotations

from typing import Protocol

from mobilevd_deploy.model.unet import MobileVDUNet


class Pass(Protocol):
    """A rewrite that keeps the network's outputs up to rounding."""

    @property
    def name(self) -> str:
        """The name that recipes and reports use: a `PassName` if a recipe may list the pass."""

    def requires(self, unet: MobileVDUNet) -> None:
        """Raise RewriteError, naming the module, if a condition for exactness is not met."""

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Rewrite in place and return the paths of the changed modules; a second call returns ()."""
