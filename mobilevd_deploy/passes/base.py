"""What a rewrite is."""

from __future__ import annotations

from typing import Protocol

from mobilevd_deploy.model.unet import MobileVDUNet


class Pass(Protocol):
    """One rewrite, which keeps the outputs up to rounding."""

    @property
    def name(self) -> str:
        """The name that recipes and reports use: a `PassName` if a recipe may list the pass."""

    def requires(self, unet: MobileVDUNet) -> None:
        """Raise RewriteError, naming the module, where the condition for exactness fails."""

    def apply(self, unet: MobileVDUNet) -> tuple[str, ...]:
        """Rewrite in place and return the paths of the modules changed; a second run returns ()."""
