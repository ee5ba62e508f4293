"""DRAM traffic of the whole UNet of `mobilevd`, by level and kind of block: writes results/unet_traffic.json.

    python benchmarks/unet_traffic.py                     what is not in the file yet
    python benchmarks/unet_traffic.py --precision float16

Compares the shipped recipe with the plain export of the same network: attention whole, matrix products,
optimisation mode 1. (At W8A16 the plain export has 1x1 convolutions and instance norms, because the plain
forms do not compile or run in float32. It was measured on 2026-11-26, before the maps of temporal
transformers and feed-forwards changed.) Blocks are compiled one by one with random weights, equal ones
once. The layers between them (convolutions in and out, resampling) are not counted. The floor is inputs,
outputs and weights once, each at the width of the precision. Each block is written when it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, cast

from _common import RESULTS, write_result

from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import GraphForms, Recipe, load_recipe
from mobilevd_deploy.profiling.traffic import measure_block, unet_blocks
from mobilevd_deploy.qnn.compiled import Traffic
from mobilevd_deploy.qnn.targets import find_target

NAME = "unet_traffic"
TARGET = "SM8650"
RECIPES = {"w8a16": "xiaomi-14-pro", "float16": "xiaomi-14-pro-float16"}
PLAIN = {
    "w8a16": GraphForms(linear="conv", group_norm="instance"),
    "float16": GraphForms(),
}
# The level of a block, counted from the largest map.
LEVELS = {"down_blocks": (0, 1, 2, 3), "up_blocks": (3, 2, 1, 0), "mid_block": (3,)}


def place(path: str) -> tuple[int, str]:
    """Return the level and the kind of a block."""
    side, index, *_ = path.split(".")
    level = LEVELS[side][int(index) if index.isdigit() else 0]
    return level, "transformer" if ".attentions." in path else "resblock"


def measure(recipe: Recipe, mode: int, rows: dict[str, Any], keep: Any) -> None:
    """Measure every block of the UNet that `rows` does not hold."""
    options = dataclasses.replace(cast(Any, recipe.npu), optimization_mode=mode)
    bare = dataclasses.replace(recipe, npu=None)  # a mode that is only measured is not refused
    known: dict[str, str] = {}
    with make_progress() as progress:
        for block in unet_blocks(load_preset("mobilevd").model, bare):
            twin = known.setdefault(block.structure, block.path)
            if block.path in rows:
                continue
            progress.begin(block.path)
            if twin in rows:
                rows[block.path] = rows[twin]
            else:
                found: Traffic = measure_block(block, bare, options, find_target(TARGET))
                weights = sum(p.numel() for p in block.module.parameters())
                floor = block.floor_bytes - (weights if recipe.quant else 0)
                rows[block.path] = {"read": found.total.read, "written": found.total.written, "floor": floor}
            keep()
            progress.end(reused=twin != block.path)


def table(precisions: dict[str, Any]) -> dict[str, Any]:
    """Return the MB of blocks by level and kind, for the recipe and the plain export."""
    tables: dict[str, Any] = {}
    for precision, sides in precisions.items():
        groups: dict[str, dict[str, float]] = {}
        for side, rows in sides.items():
            for path, row in rows.items():
                level, kind = place(path)
                for group in (f"level {level} {kind}", "sum"):
                    sums = groups.setdefault(group, {})
                    sums[side] = sums.get(side, 0) + (row["read"] + row["written"]) / 1e6
                    if side == "ours":
                        sums["floor"] = sums.get("floor", 0) + row["floor"] / 1e6
        tables[precision] = {
            group: {key: round(value, 1) for key, value in sums.items()}
            | ({"of_plain": round(sums["ours"] / sums["plain"], 3)} if {"ours", "plain"} <= set(sums) else {})
            for group, sums in sorted(groups.items())
        }
    return tables


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--precision", choices=RECIPES, default="w8a16")
    parser.add_argument("--side", choices=("ours", "plain"), help="only this one")
    options = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    blocks: dict[str, Any] = json.loads(file.read_text())["blocks"] if file.exists() else {}

    def keep() -> None:
        write_result(
            NAME, {"target": TARGET, "preset": "mobilevd", "megabytes": table(blocks), "blocks": blocks}
        )

    ours = load_recipe(RECIPES[options.precision])
    plain = dataclasses.replace(ours, graph=PLAIN[options.precision])
    sides = {"ours": (ours, cast(Any, ours.npu).optimization_mode), "plain": (plain, 1)}
    for side, (recipe, mode) in sides.items():
        if options.side in (None, side):
            measure(recipe, mode, blocks.setdefault(options.precision, {}).setdefault(side, {}), keep)


if __name__ == "__main__":
    main()
