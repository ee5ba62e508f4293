"""Location of the shipped data: models/ (presets, demo checkpoint) and export/ (recipes)."""

from __future__ import annotations

from pathlib import Path


def data_dir(kind: str) -> Path:
    """Return the folder of `kind` ("models" or "export").

    In an installed wheel the folder is inside the package, in a checkout beside the package.
    """
    packaged = Path(__file__).parents[1] / "_data" / kind
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / kind
