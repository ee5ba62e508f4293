"""How a target wants its model: which rewrites, which forms of the graph, which floors of quality.

Recipe                 one TOML file of export/, or of the user's
├── passes             names of the exact rewrites, in running order
├── graph: GraphForms  equivalent ways to write the same network; what is fastest differs by target
├── onnx: OnnxOptions
├── quant: QuantScheme  bits, ranges and calibration; absent: the network stays in floats
├── npu: NpuOptions     chips to compile for, and how; absent: the artifact ends with ONNX
└── floors: Floors     below these the export fails
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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


@dataclass(frozen=True)
class GraphForms:
    """Equivalent forms of the deploy network; the outputs are the same, the speed is not.

    `attention`: the score map of all heads at once ("whole"), for `query_tile` query positions at a time
    ("tiles"), or for one head at a time, in such tiles ("heads"); maps of up to `whole_up_to` tokens have it
    whole in any case. `frames`: as the batch axis, or one frame after the other.
    `linear`: matrix products or 1x1 convolutions. `group_norm`: as such, or as instance norm over the
    reshaped map and a per-channel affine. `upsample`: nearest neighbour and a 3x3 convolution, or four
    2x2 convolutions on the small map ("subpixel"). `temporal_conv`: in temporal resblocks frames are the rows
    of (1, C, T, H W), or the columns of (1, C, H W, T).
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
    """`opset` of the written models; `simplify` runs onnxsim over them."""

    opset: int = 21
    simplify: bool = True

    def __post_init__(self) -> None:
        if not 18 <= self.opset <= 23:
            raise SpecError(f"onnx.opset: {self.opset} is not from 18 to 23")


@dataclass(frozen=True)
class QuantRule:
    """Other bits for the modules whose path matches `modules` (shell wildcards); None: as the scheme says.

    32 bits mean float. The first rule that matches a module decides. `component`: the only one that the rule
    is for; None: any, as "conv_in" may be a module of several.
    """

    modules: str
    weights: Literal[4, 8, 16, 32] | None = None
    activations: Literal[8, 16, 32] | None = None
    component: ComponentName | None = None


@dataclass(frozen=True)
class QuantScheme:
    """How AIMET quantises: symmetric weights per output channel, asymmetric activations per tensor.

    `headroom` stretches the calibrated ranges of 16-bit activations, which have resolution to spare and
    clip what calibration did not see. `samples` pictures calibrate, drawn by `seed`.
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
        """Like "w8a16", whatever the rules make of single modules."""
        return f"w{self.weights}a{self.activations}"

    @property
    def narrowest(self) -> int:
        """Fewest bits that the scheme or a rule of it gives to activations."""
        return min([self.activations, *(rule.activations or 32 for rule in self.rules)])


@dataclass(frozen=True)
class NpuOptions:
    """What the Hexagon compiler is told.

    `targets`: chips in any spelling that `find_chip` resolves, kept as part numbers ("SM8650").
    `optimization_mode`: QNN's htp_graph_finalization_optimization_mode. `parts`: context binaries of the
    UNet; 0, as for the other components: the fewest below 2 GiB each that compile in less than 6.5 GB.
    Operations that run in float32 although the graph asks for integers, or tensors narrower than asked, fail
    the export unless their name matches `allow`. A compilation is stopped above `compiler_memory_gb` (0: the
    memory that is free when it starts), and after `compiler_hours`.
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
            raise SpecError("npu.targets: there is none")
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
            raise SpecError(f"npu.compiler_hours: {self.compiler_hours} leaves no time")

    def deciding(self, target: str) -> dict[str, Any]:
        """Return as plain values what decides the binary for `target`: all but limits and other targets."""
        limits = ("compiler_memory_gb", "compiler_hours")
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in limits}
        return values | {"targets": target}


@dataclass(frozen=True)
class Floors:
    """Below these the export fails. SQNR against the trained network in float32 unless it says otherwise.

    `rewrite_sqnr_db`, `onnx_sqnr_db`: after the rewrites, after the float export. `quantised_sqnr_db`: of
    each component on calibration-like inputs that it did not see. `clip_psnr_db`: of the clip of the
    quantised pipeline against the float clip. `conditioning`: of how much an output answers to a change of
    one input, quantised over float; it may be at most the inverse too. `simulator_db`: SQNR of a binary on
    the HTP simulator against AIMET's own simulation, with 16-bit activations. `float16_sqnr_db`: of a float16
    binary on the simulator against the float run.
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
        if not 0 <= self.conditioning < 1:
            raise SpecError(f"floors.conditioning: {self.conditioning} is not from 0 to 1")


@dataclass(frozen=True)
class Recipe:
    """Everything about an export that is not in the checkpoint."""

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
        # Measured on the simulator at 14x32x8x16, 7x96x2x4 and 7x96x1x2: 0.1 dB, mode 3 has 78 to 81.
        mode = self.npu.optimization_mode if self.quant and self.npu else None
        if mode == 1 and self.graph.group_norm == "instance":
            raise SpecError(
                "npu.optimization_mode: 1 computes 16-bit instance norms wrongly; 0, 2 and 3 do not"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, every default written out."""
        return dataclasses.asdict(self)

    def compiled_for(self, targets: Sequence[str] = (), parts: int | None = None) -> Recipe:
        """Return the recipe for these chips, or its own, and with the UNet in `parts`, or in its own number.

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
    """Names of the shipped recipes."""
    return shipped_names("export")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by name or by TOML file.

    Raises SpecError for an unknown name, unreadable TOML, an unknown key or a value that does not fit.
    """
    values = read_named_toml("export", "recipe", name_or_path)
    return from_dict(Recipe, {"name": Path(name_or_path).stem} | values)


def to_toml(recipe: Recipe) -> str:
    """Return the text of the file that `load_recipe` reads; the name is left to the file's."""
    values = {key: value for key, value in recipe.to_dict().items() if key != "name"}
    return "\n".join((*_toml_lines(values), ""))


def _toml_lines(table: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the plain values of a table first, as TOML wants it; JSON writes those as TOML does."""
    below: list[tuple[str, Mapping[str, Any]]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            below.append((f"[{where}{key}]", value))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, dict) for item in value):
            below += [(f"[[{where}{key}]]", item) for item in value]
        elif value is not None:
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
    for heading, values in below:
        yield from ("", heading, *_toml_lines(values, f"{heading.strip('[]')}."))
