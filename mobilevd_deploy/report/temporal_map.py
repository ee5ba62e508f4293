"""The map of a UNet's temporal blocks: which are kept, how important each is, and where its bar is drawn.

Running order goes from left to right and levels go from top to bottom, so the map has the UNet's shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mobilevd_deploy.config.recipe import PassName
from mobilevd_deploy.config.spec import ModelSpec, UNetSpec

DROP_PASS: PassName = (
    "drop-temporal-blocks"  # without this pass, a dropped block stays in the graph with gate 0
)

_GAP = 0.7  # between groups, in columns
_HEADING, _BAND, _LABEL, _BAR = 22, 92, 24, 56  # heights in pixels
_LEAST = 0.12  # of the bar's height, so that the least important block stays visible


@dataclass(frozen=True)
class MapBlock:
    """A temporal block: its path in the UNet, its kind, and its level (0 = full latent resolution)."""

    path: str
    kind: Literal["resnet", "transformer"]
    level: int


@dataclass(frozen=True)
class MapBar:
    """The bar of one block: `x` and `width` as fractions of the map's width, `y` and `height` in pixels.

    `importance` is None where training recorded none.
    """

    block: MapBlock
    kept: bool
    importance: float | None
    x: float
    width: float
    y: float
    height: float

    @property
    def state(self) -> str:
        """`kept` in one word."""
        return "kept" if self.kept else "dropped"


@dataclass(frozen=True)
class MapLevel:
    """One level of the map: what its blocks work on, the y of its floor, and the x of its skip connection.

    The skip connection goes from the end of the down block to the start of the up block. Each x is a fraction
    of the map's width.
    """

    number: int
    frames: int
    width: int
    height: int
    channels: int
    x: float
    floor: int
    skip: tuple[float, float]

    @property
    def label_y(self) -> int:
        """Baseline of the label, above the tallest bar."""
        return self.floor - _BAR - 8


@dataclass(frozen=True)
class TemporalMap:
    """All bars in running order, the levels from top to bottom, and the x of the middle block's centre.

    `by_importance`: whether heights show importance. If not, all bars are equally high.
    """

    bars: tuple[MapBar, ...]
    levels: tuple[MapLevel, ...]
    middle: float
    by_importance: bool

    @property
    def bottom(self) -> int:
        """Floor of the lowest level, in pixels."""
        return self.levels[-1].floor

    @property
    def kept(self) -> int:
        """Number of blocks that are kept."""
        return sum(bar.kept for bar in self.bars)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Kind -> number of blocks that are kept, and of all."""
        flags = {
            kind: [b.kept for b in self.bars if b.block.kind == kind] for kind in ("transformer", "resnet")
        }
        return {kind: (sum(kept), len(kept)) for kind, kept in flags.items()}

    @property
    def importance(self) -> tuple[float, float]:
        """Lowest and highest importance; meaningful with `by_importance`."""
        values = [bar.importance for bar in self.bars if bar.importance is not None]
        return min(values), max(values)


def temporal_block_groups(unet: UNetSpec) -> list[list[MapBlock]]:
    """List the temporal blocks in running order: one group per down block, the middle, one per up block.

    The names are those of diffusers' module tree. Up blocks run from the lowest level and have one layer
    more than down blocks; the middle has two resnets around one transformer.
    """
    layers = unet.layers_per_block

    def stack(name: str, resnets: int, transformers: int) -> list[MapBlock]:
        level, blocks = unet.level_of(name), []
        for index in range(resnets):
            blocks.append(MapBlock(f"{name}.resnets.{index}", "resnet", level))
            if index < transformers:
                blocks.append(MapBlock(f"{name}.attentions.{index}", "transformer", level))
        return blocks

    def side(name: str, resnets: int) -> list[list[MapBlock]]:
        paths = [f"{name}.{index}" for index in range(len(unet.block_out_channels))]
        return [stack(path, resnets, resnets if unet.attention[unet.level_of(path)] else 0) for path in paths]

    return [*side("down_blocks", layers), stack("mid_block", 2, 1), *side("up_blocks", layers + 1)]


def temporal_map(spec: ModelSpec, importance: Mapping[str, float]) -> TemporalMap:
    """Lay out the temporal blocks of a network.

    Args:
        spec: of the network; `kept_temporal_blocks` None keeps all of them.
        importance: path -> importance; may be empty, or lack some blocks. Other paths are ignored.
    """
    groups = temporal_block_groups(spec.unet)
    kept = spec.unet.kept_temporal_blocks
    paths = [block.path for group in groups for block in group]
    values = {path: importance[path] for path in paths if path in importance}
    by_importance = len(set(values.values())) > 1
    floors = [_HEADING + _BAND * level + _LABEL + _BAR for level in range(len(spec.unet.block_out_channels))]
    column = 1 / (len(paths) + _GAP * (len(groups) - 1))
    bars, ends, x = [], [], 0.0
    for group in groups:
        ends.append((x, x + column * len(group)))
        for block in group:
            height = _BAR * (_relative(values, block.path) if by_importance else 1.0)
            bars.append(
                MapBar(
                    block,
                    kept is None or block.path in kept,
                    values.get(block.path),
                    x + 0.1 * column,
                    0.8 * column,
                    floors[block.level] - height,
                    height,
                )
            )
            x += column
        x += _GAP * column
    levels = tuple(_level(spec, level, floor, ends) for level, floor in enumerate(floors))
    return TemporalMap(tuple(bars), levels, sum(ends[len(floors)]) / 2, by_importance)


def _relative(values: Mapping[str, float], path: str) -> float:
    """Return a bar's height from `_LEAST` to 1, linear in importance; the range of importance includes 0."""
    low, high = min(0.0, *values.values()), max(0.0, *values.values())
    part = (values[path] - low) / (high - low) if path in values else 0.0
    return _LEAST + (1 - _LEAST) * part


def _level(spec: ModelSpec, level: int, floor: int, ends: Sequence[tuple[float, float]]) -> MapLevel:
    height, width = spec.latent_size
    return MapLevel(
        number=level,
        frames=spec.unet.frames_at(level, spec.frames),
        width=width >> level,
        height=height >> level,
        channels=spec.unet.block_out_channels[level],
        x=ends[level][0],
        floor=floor,
        skip=(ends[level][1], ends[-1 - level][0]),
    )
