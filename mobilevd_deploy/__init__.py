"""Takes a trained MobileVD checkpoint to a Snapdragon phone.

import mobilevd_deploy as mvd

artifact = mvd.deploy("ckpt.safetensors", mvd.load_recipe("xiaomi-14-pro"), "clip-model")
clip = mvd.generate(artifact, "photo.jpg", seed=7, output="clip.gif")

The names of `__all__` are imported at their first use, so that importing the package loads no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilevd_deploy.artifact.artifact import Artifact
    from mobilevd_deploy.config.recipe import load_recipe
    from mobilevd_deploy.deploy import deploy
    from mobilevd_deploy.generate import generate
    from mobilevd_deploy.model.checkpoint import open_checkpoint

__version__ = "0.1.0"
__all__ = ["Artifact", "deploy", "generate", "load_recipe", "open_checkpoint"]

_MODULES = {
    "Artifact": "mobilevd_deploy.artifact.artifact",
    "deploy": "mobilevd_deploy.deploy",
    "generate": "mobilevd_deploy.generate",
    "load_recipe": "mobilevd_deploy.config.recipe",
    "open_checkpoint": "mobilevd_deploy.model.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package. A public function keeps its name where a submodule has the same one.

    The import system binds a submodule to its package. Without this, `mobilevd_deploy.deploy` would be the
    function or the module, depending on what was imported first.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
