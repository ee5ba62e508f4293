"""How a target wants its model: which rewrites, which forms of the graph, which floors of quality.

Recipe                 one TOML file of export/, or of the user's
├── passes             names of the exact rewrites, in running order
├── graph: GraphForms  equivalent ways to write the same network; what is fastest differs by target
├── onnx: OnnxOptions
└── floors: Floors     below these the export fails
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mobilevd_deploy.errors import SpecError
from mobilevd_deploy.spec import from_dict, read_named_toml, shipped_names

PassName = Literal[
    "fold-channel-funnels",
    "single-token-cross-attention",
    "drop-temporal-blocks",
    "fold-single-step",
    "fold-preconditioning",
]


@dataclass(frozen=True)
class GraphForms:
    """Equivalent forms of the deploy network; the outputs are the same, the speed is not.

    `attention`: the score map of all heads at once ("whole"), for `query_tile` query positions at a time
    ("tiles"), or one head at a time ("heads"). `frames`: as the batch axis, or one frame after the other.
    `linear`: matrix products or 1x1 convolutions. `group_norm`: as such, or as instance norm over the
    reshaped map and a per-channel affine. `upsample`: nearest neighbour and a 3x3 convolution, or four
    2x2 convolutions on the small map ("subpixel").
    """

    attention: Literal["whole", "tiles", "heads"] = "whole"
    query_tile: int = 512
    frames: Literal["batch", "sequential"] = "batch"
    linear: Literal["matmul", "conv"] = "matmul"
    group_norm: Literal["group", "instance"] = "group"
    upsample: Literal["nearest", "subpixel"] = "nearest"

    def __post_init__(self) -> None:
        if self.query_tile < 1:
            raise SpecError(f"graph.query_tile: {self.query_tile} is less than 1")


@dataclass(frozen=True)
class OnnxOptions:
    """`opset` of the written models; `simplify` runs onnxsim over them."""

    opset: int = 21
    simplify: bool = True

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 23:
            raise SpecError(f"onnx.opset: {self.opset} is not from 18 to 23")


@dataclass(frozen=True)
class Floors:
    """Least SQNR in dB against the trained network in float32: after the rewrites, after the export."""

    rewrite_sqnr_db: float = 90.0
    onnx_sqnr_db: float = 90.0

    def __post_init__(self) -> None:
        for name, floor in dataclasses.asdict(self).items():
            if not math.isfinite(floor):
                raise SpecError(f"floors.{name}: {floor} is not a finite number")


@dataclass(frozen=True)
class Recipe:
    """Everything about an export that is not in the checkpoint."""

    name: str
    description: str = ""
    passes: tuple[PassName, ...] = ()
    graph: GraphForms = field(default_factory=GraphForms)
    onnx: OnnxOptions = field(default_factory=OnnxOptions)
    floors: Floors = field(default_factory=Floors)

    def __post_init__(self) -> None:
        if twice := sorted({name for name in self.passes if self.passes.count(name) > 1}):
            raise SpecError(f"passes: {twice[0]!r} is named twice")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, every default written out."""
        return dataclasses.asdict(self)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return shipped_names("export")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by name or by TOML file.

    Raises SpecError for an unknown name, unreadable TOML, an unknown key or a value that does not fit.
    """
    values = read_named_toml("export", "recipe", name_or_path)
    return from_dict(Recipe, {"name": Path(name_or_path).stem} | values)
