"""DRAM traffic of level-0 blocks at the paper's full size, form by form: writes results/dram_traffic.json.

    python benchmarks/dram_traffic.py               every row that is not in the file yet
    python benchmarks/dram_traffic.py --only w8a16  rows whose key holds this text

A subject is a resblock followed by a transformer, in one graph, with the sizes of `mobilevd` (14 frames of
32x64, 320 channels, r = 0.5 in spatial attention) and random weights:

    spatial          down_blocks.0, index 1, without its temporal blocks
    spatio-temporal  up_blocks.3, index 2, with them

`of_plain` is the ratio to the plain export: attention whole, frames as a batch, matrix products, optimisation
mode 1. At W8A16 the plain export has 1x1 convolutions instead of matrix products, which do not compile, and
instance norms instead of group norms, which run in float32. The plain rows date from 2026-11-26, before
`linear = "conv"` changed the maps of temporal transformers and feed-forwards. Group norms over more than
131,072 elements have since been written in two steps (`npu.ops.TwoStepGroupNorm`).

Each row is written when it is finished, so an interrupted run resumes. Bytes come from the compiler's
schedule, not from a chip. Seconds cover compiling and reading the schedule; the machine may have had other
load.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import onnx
from _common import RESULTS, write_result
from torch import Tensor, nn

from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import GraphForms, NpuOptions, Recipe, load_recipe
from mobilevd_deploy.errors import VendorError
from mobilevd_deploy.npu.onnx_export import MODEL
from mobilevd_deploy.profiling.traffic import Block, export_block, unet_blocks
from mobilevd_deploy.qnn.compiler import measure_traffic
from mobilevd_deploy.qnn.targets import find_target

NAME = "dram_traffic"
TARGET = "SM8650"
RECIPES = {"float16": "npu-float", "w8a16": "xiaomi-14-pro"}
SUBJECTS = {
    "spatial": ("down_blocks.0.resnets.1", "down_blocks.0.attentions.1"),
    "spatio-temporal": ("up_blocks.3.resnets.2", "up_blocks.3.attentions.2"),
}
SPILLS = 6


@dataclasses.dataclass(frozen=True)
class Step:
    """A row to measure."""

    subject: str
    precision: str
    mode: int
    forms: GraphForms

    @property
    def key(self) -> str:
        """Everything that decides the number, as text."""
        forms = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self.forms).items())
        return f"{self.subject}, {self.precision}, mode {self.mode}, {forms}"


PLAIN = GraphForms("whole", frames="batch", linear="matmul", group_norm="group")
HEADS = GraphForms("heads", 512, frames="batch", linear="conv", group_norm="instance")


def steps() -> list[Step]:
    """Return all rows, the most important first."""
    change = dataclasses.replace
    plain = {"float16": PLAIN, "w8a16": change(PLAIN, linear="conv", group_norm="instance")}
    pairs = [(subject, precision) for precision in RECIPES for subject in SUBJECTS]
    return [
        *(Step(subject, precision, 1, plain[precision]) for subject, precision in pairs),
        *(Step(subject, precision, 0, HEADS) for subject, precision in pairs),
        *(
            Step("spatio-temporal", precision, 0, change(HEADS, temporal_conv="columns"))
            for precision in RECIPES
        ),
        Step("spatial", "w8a16", 1, change(PLAIN, group_norm="instance")),  # does not compile
        *(Step(subject, precision, 0, change(HEADS, query_tile=256)) for subject, precision in pairs),
        Step("spatial", "float16", 0, change(HEADS, query_tile=256, linear="matmul")),
        Step("spatial", "float16", 0, change(HEADS, query_tile=256, frames="sequential")),
        Step("spatial", "float16", 0, change(HEADS, attention="tiles", query_tile=128)),
        *(
            Step(subject, precision, 0, change(HEADS, attention="whole"))
            for precision in RECIPES
            for subject in SUBJECTS
        ),
        *(
            Step("spatio-temporal", "w8a16", 0, change(HEADS, attention=attention, temporal_conv="columns"))
            for attention in ("whole", "tiles")
        ),
        *(
            Step(subject, precision, 0, change(HEADS, attention="tiles"))
            for precision in RECIPES
            for subject in SUBJECTS
        ),
        Step("spatial", "float16", 3, HEADS),
        Step("spatial", "w8a16", 3, HEADS),
    ]


class Pair(nn.Module):
    """A resblock followed by a transformer."""

    def __init__(self, resnet: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.resnet, self.attention = resnet, attention

    def forward(self, x: Tensor, image_embeds: Tensor) -> Tensor:
        """Map (T, C, H, W) to (T, C', H, W)."""
        return cast(Tensor, self.attention(self.resnet(x), image_embeds))


def make_block(step: Step, recipe: Recipe) -> Block:
    """Build the subject of a step with random weights."""
    spec = load_preset("mobilevd").model
    if step.subject == "spatial":
        spec = dataclasses.replace(spec, unet=dataclasses.replace(spec.unet, kept_temporal_blocks=()))
    resnet, attention = unet_blocks(spec, recipe, SUBJECTS[step.subject])
    if resnet.path != SUBJECTS[step.subject][0]:
        resnet, attention = attention, resnet
    inputs = resnet.inputs | {"image_embeds": attention.inputs["image_embeds"]}
    return Block(step.subject, Pair(resnet.module, attention.module).eval(), inputs)


def measure(step: Step) -> dict[str, Any]:
    """Export, compile, read the schedule."""
    recipe = dataclasses.replace(load_recipe(RECIPES[step.precision]), graph=step.forms, npu=None)
    block = make_block(step, recipe)
    modules = sum(not any(m.children()) and not isinstance(m, nn.ModuleList) for m in block.module.modules())
    options = NpuOptions(targets=(TARGET,), optimization_mode=cast(Any, step.mode))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / MODEL
        export_block(block, recipe, Path(folder))
        nodes = len(onnx.load(model, load_external_data=False).graph.node)
        row = {
            "subject": step.subject,
            "precision": step.precision,
            "mode": step.mode,
            "forms": dataclasses.asdict(step.forms),
            "floor": block.floor_bytes,
            "modules": modules,
            "onnx_nodes": nodes,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        begun = time.monotonic()
        try:
            found = measure_traffic(model, find_target(TARGET), options, float16=recipe.quant is None)
        except VendorError as error:
            return row | {"error": error.what.replace(str(model), MODEL)}
        seconds = time.monotonic() - begun
    spills = sorted(found.modules.items(), key=lambda item: -item[1].written)[:SPILLS]
    return row | {
        "read": found.total.read,
        "written": found.total.written,
        "compile_seconds": round(seconds, 1),
        "most_written": {name: moved.written for name, moved in spills},
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose key holds this text")
    only: str = parser.parse_args().only
    file = RESULTS / f"{NAME}.json"
    missing = [step for step in steps() if step.key not in kept(file) and only in step.key]
    with make_progress() as progress:
        progress.plan({step.key: 1.0 for step in missing})
        for step in missing:
            progress.begin(step.key)
            row = measure(step)
            rows = kept(file) | {step.key: row}
            write_result(NAME, {"target": TARGET, "preset": "mobilevd", "rows": with_ratios(rows)})
            progress.end()


def kept(file: Path) -> dict[str, Any]:
    """Return the rows that are finished."""
    return dict(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.exists() else {}


def with_ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Add to each row its traffic over that of the plain export of its subject and precision."""
    measured = [row for row in rows.values() if "error" not in row]
    plain = {
        (row["subject"], row["precision"]): row["read"] + row["written"]
        for row in measured
        if row["mode"] == 1 and row["forms"]["attention"] == "whole"
    }
    for row in measured:
        before = plain.get((row["subject"], row["precision"]))
        row["of_plain"] = round((row["read"] + row["written"]) / before, 4) if before else None
    return rows


if __name__ == "__main__":
    main()
