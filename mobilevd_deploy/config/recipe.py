"""Recipes: how to export for a target. A recipe is a TOML file of export/ or of the user.

Recipe
├── passes              names of the exact rewrites, in running order
├── graph: GraphForms   equivalent forms of the network; the fastest form depends on the target
├── onnx: OnnxOptions   how ONNX is written
├── quant: QuantScheme  bits, ranges and calibration; without it the network stays in float
├── npu: NpuOptions     chips to compile for, and how; without it the artifact holds ONNX only
└── floors: Floors      the export fails below these
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from mobilevd_deploy.config.devices import find_chip
from mobilevd_deploy.config.spec import ComponentName
from mobilevd_deploy.config.strict import from_dict, read_named_toml, shipped_names
from mobilevd_deploy.errors import SpecError, UsageError

PassName = Literal[
    "fold-channel-funnels",
    "single-token-cross-attention",
    "drop-temporal-blocks",
    "fold-single-step",
    "fold-preconditioning",
]
"""Passes that a recipe may list, in running order. `graph.upsample = "subpixel"` adds another one."""


@dataclass(frozen=True)
class GraphForms:
    """Equivalent forms of the deploy network: the outputs are equal up to rounding, the speed differs.

    - `attention`: computes the scores of all heads at once ("whole"), of all heads and `query_tile`
      queries at a time ("tiles"), or of one head and `query_tile` queries at a time ("heads").
    - `whole_up_to`: maps of at most so many tokens always use "whole".
    - `frames`: frames are the batch axis ("batch"), or run one after the other ("sequential").
    - `linear`: linear layers are matrix products ("matmul") or 1x1 convolutions ("conv").
    - `group_norm`: group norm ("group"), or instance norm over the reshaped map and a per-channel affine
      ("instance").
    - `upsample`: nearest neighbour and a 3x3 convolution ("nearest"), or four 2x2 convolutions on the
      small map ("subpixel").
    - `temporal_conv`: in temporal resblocks, frames are the rows of (1, C, T, H W) ("rows") or the
      columns of (1, C, H W, T) ("columns").
    """

    attention: Literal["whole", "tiles", "heads"] = "whole"
    query_tile: int = 512
    frames: Literal["batch", "sequential"] = "batch"
    linear: Literal["matmul", "conv"] = "matmul"
    group_norm: Literal["group", "instance"] = "group"
    upsample: Literal["nearest", "subpixel"] = "nearest"
    whole_up_to: int = 0
    temporal_conv: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        if self.query_tile < 1:
            raise SpecError(f"graph.query_tile: {self.query_tile} is less than 1")
        if self.whole_up_to < 0:
            raise SpecError(f"graph.whole_up_to: {self.whole_up_to} is negative")


@dataclass(frozen=True)
class OnnxOptions:
    """`opset` of the ONNX models; `simplify` runs onnxsim on them."""

    opset: int = 21
    simplify: bool = True

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 23:
            raise SpecError(f"onnx.opset: {self.opset} is not from 18 to 23")


@dataclass(frozen=True)
class QuantRule:
    """Other bits for the modules whose path matches `modules` (shell wildcards).

    None keeps the scheme's bits; 32 bits mean float. The first rule that matches a module applies.
    `component` limits the rule to one component; None means all of them, since several components may have a
    module of the same path, such as "conv_in".
    """

    modules: str
    weights: Literal[4, 8, 16, 32] | None = None
    activations: Literal[8, 16, 32] | None = None
    component: ComponentName | None = None


@dataclass(frozen=True)
class QuantScheme:
    """How AIMET quantises: symmetric weights per output channel, asymmetric activations per tensor.

    `headroom` is a factor on the calibrated ranges of 16-bit activations: they have resolution to spare, and
    wider ranges clip less on inputs that calibration did not see. `samples`: number of calibration pictures;
    `seed` chooses them.
    """

    weights: Literal[4, 8] = 8
    activations: Literal[8, 16] = 16
    headroom: float = 1.25
    samples: int = 8
    seed: int = 0
    rules: tuple[QuantRule, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.headroom <= 4:
            raise SpecError(f"quant.headroom: {self.headroom} is not from 1 to 4")
        if self.samples < 1:
            raise SpecError(f"quant.samples: {self.samples} is less than 1")

    def of(self, component: str) -> QuantScheme:
        """Return the scheme without the rules of other components."""
        rules = tuple(rule for rule in self.rules if rule.component in (None, component))
        return dataclasses.replace(self, rules=rules)

    @property
    def precision(self) -> str:
        """The scheme's bits, such as "w8a16"; rules are not considered."""
        return f"w{self.weights}a{self.activations}"

    @property
    def narrowest(self) -> int:
        """Lowest number of activation bits in the scheme and its rules."""
        return min([self.activations, *(rule.activations or 32 for rule in self.rules)])


@dataclass(frozen=True)
class NpuOptions:
    """Options of the Hexagon compiler.

    - `targets`: chips in any spelling that `find_chip` resolves, kept as part numbers ("SM8650").
    - `optimization_mode`: QNN's htp_graph_finalization_optimization_mode. `vtcm_mb`: QNN's vtcm_mb.
    - `parts`: number of parts that the UNet is split into. 0: as few as possible, so that each part is
      smaller than 2 GiB and takes less than 6.5 GB to compile. Other components are always split that way.
    - `allow`: name patterns (shell wildcards) of operations that may run in float32 although the graph
      asks for integers, and of tensors that may have fewer bits than the graph asks for. Others fail the
      export.
    - `compiler_memory_gb`: memory limit of a compilation; 0 means the memory that is free when it starts.
    - `compiler_hours`: time limit of a compilation.
    """

    targets: tuple[str, ...] = ("SM8650",)
    optimization_mode: Literal[0, 1, 2, 3] = 3
    vtcm_mb: int = 8
    parts: int = 0
    allow: tuple[str, ...] = ()
    compiler_memory_gb: float = 0
    compiler_hours: float = 4

    def __post_init__(self) -> None:
        if not self.targets:
            raise SpecError("npu.targets: the list is empty")
        try:
            # Stages and files are named by part number, so one chip must have one spelling.
            object.__setattr__(self, "targets", tuple(find_chip(name).part_number for name in self.targets))
        except UsageError as error:
            raise SpecError(f"npu.targets: {error.what}", next_step=error.next_step) from error
        if twice := sorted({name for name in self.targets if self.targets.count(name) > 1}):
            raise SpecError(f"npu.targets: {twice[0]!r} is named twice")
        for name in ("vtcm_mb", "parts", "compiler_memory_gb"):
            if getattr(self, name) < 0:
                raise SpecError(f"npu.{name}: {getattr(self, name)} is negative")
        if not self.compiler_hours > 0:
            raise SpecError(f"npu.compiler_hours: {self.compiler_hours} is not positive")

    def deciding(self, target: str) -> dict[str, Any]:
        """Return, as plain values, the options that determine the binary for `target`.

        Limits and other targets do not: a raised limit keeps finished binaries.
        """
        limits = ("compiler_memory_gb", "compiler_hours")
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in limits}
        return values | {"targets": target}


@dataclass(frozen=True)
class Floors:
    """The export fails below these values. SQNR is in dB, relative to the trained network in float32.

    - `rewrite_sqnr_db`: minimum SQNR after the rewrites.
    - `onnx_sqnr_db`: minimum SQNR of the float ONNX models.
    - `quantised_sqnr_db`: minimum SQNR of each quantised component, on pictures that did not calibrate.
    - `clip_psnr_db`: minimum PSNR of the quantised clip, relative to the float clip.
    - `conditioning`: minimum change of the quantised output, relative to float, when one input changes;
      the maximum is 1 / `conditioning`.
    - `simulator_db`: minimum SQNR of the written graph, of its parts in a row and of the binary on the HTP
      simulator, relative to AIMET's simulation, with 16-bit activations.
    - `float16_sqnr_db`: minimum SQNR of a float16 binary on the HTP simulator, relative to the float run.
    """

    rewrite_sqnr_db: float = 90.0
    onnx_sqnr_db: float = 90.0
    quantised_sqnr_db: float = 25.0
    clip_psnr_db: float = 30.0
    conditioning: float = 0.8
    simulator_db: float = 50.0
    float16_sqnr_db: float = 35.0

    def __post_init__(self) -> None:
        for name, floor in dataclasses.asdict(self).items():
            if not math.isfinite(floor):
                raise SpecError(f"floors.{name}: {floor} is not a finite number")
        # Its inverse is the upper limit of the same ratio, so 0 would allow everything.
        if not 0 < self.conditioning < 1:
            raise SpecError(f"floors.conditioning: {self.conditioning} is not between 0 and 1")


@dataclass(frozen=True)
class Recipe:
    """All settings of an export; the checkpoint holds everything else."""

    name: str
    description: str = ""
    passes: tuple[PassName, ...] = ()
    graph: GraphForms = field(default_factory=GraphForms)
    onnx: OnnxOptions = field(default_factory=OnnxOptions)
    quant: QuantScheme | None = None
    npu: NpuOptions | None = None
    floors: Floors = field(default_factory=Floors)

    def __post_init__(self) -> None:
        if twice := sorted({name for name in self.passes if self.passes.count(name) > 1}):
            raise SpecError(f"passes: {twice[0]!r} is named twice")
        # SQNR of mode 1 on the HTP simulator: 0.1 dB, against 78 to 81 dB of mode 3 (instance norms of
        # 14x32x8x16, 7x96x2x4 and 7x96x1x2).
        mode = self.npu.optimization_mode if self.quant and self.npu else None
        if mode == 1 and self.graph.group_norm == "instance":
            raise SpecError("npu.optimization_mode: 1 computes 16-bit instance norms wrongly; use 0, 2 or 3")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; defaults are included."""
        return dataclasses.asdict(self)

    def agreement_floor(self, component: str) -> tuple[Literal["float", "quantised"], float]:
        """Return what the output of a component's compiled form is compared with, and the floor in dB SQNR.

        "quantised": the quantised network, with 16-bit activations. "float": the float network, if the
        component is in float16 or has activations of fewer bits: rounding differences propagate at 8 bits.
        """
        if self.quant is None:
            return "float", self.floors.float16_sqnr_db
        if self.quant.of(component).narrowest < 16:
            return "float", self.floors.quantised_sqnr_db
        return "quantised", self.floors.simulator_db

    def compiled_for(self, targets: Sequence[str] = (), parts: int | None = None) -> Recipe:
        """Return the recipe with these `targets` and `parts`; the recipe's own where they are not given.

        `targets` may have any spelling; a chip that is named twice counts once. Raises UsageError for a
        recipe without [npu], and for an unknown chip.
        """
        if self.npu is None:
            raise UsageError(
                f"recipe {self.name} compiles for no chip", next_step="choose a recipe with [npu]"
            )
        named = (find_chip(name).part_number for name in targets)
        chips = tuple(dict.fromkeys(named)) or self.npu.targets
        npu = dataclasses.replace(self.npu, targets=chips, parts=parts or self.npu.parts)
        return dataclasses.replace(self, npu=npu)


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return shipped_names("export")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by its name or by the path of a TOML file.

    Raises SpecError for an unknown name, unreadable TOML, an unknown key or an invalid value.
    """
    values = read_named_toml("export", "recipe", name_or_path)
    return from_dict(Recipe, {"name": Path(name_or_path).stem} | values)


def to_toml(recipe: Recipe) -> str:
    """Return the recipe as TOML that `load_recipe` reads. The name is left out: the file's name gives it."""
    # TOML has no null; a key that is absent reads as None.
    values = dataclasses.asdict(recipe, dict_factory=lambda items: {k: v for k, v in items if v is not None})
    del values["name"]
    return tomli_w.dumps(values)
