"""The paper's UNet as one context binary, in W8A16 and in float16: adds to results/whole_unet.json.

    python benchmarks/whole_unet.py --artifact build/full/artifact --precision float16 [--mode 0]

The graphs are those of an artifact that `full_size.py --keep` left. What is new beside full_size.json is the
compiler's own sum of the bytes that a run moves from and to DRAM, and float16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from _common import RESULTS, write_result

from mobilevd_deploy.artifact import Artifact
from mobilevd_deploy.qnn import compile_context, find_target
from mobilevd_deploy.recipe import NpuOptions

NAME, TARGET = "whole_unet", "SM8650"
ROLES = {"w8a16": "quantised", "float16": "model"}


def main() -> None:
    """Compile, and add a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--precision", choices=ROLES, required=True)
    parser.add_argument("--mode", type=int, default=0, choices=range(4), help="optimisation mode")
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    artifact, npu = Artifact.open(options.artifact), NpuOptions(targets=(TARGET,))
    (unet,) = (c for c in artifact.manifest.components if c.name == "unet")
    with tempfile.TemporaryDirectory() as folder:
        made = compile_context(
            artifact.path(unet, ROLES[options.precision]),
            Path(folder),
            find_target(TARGET),
            dataclasses.replace(npu, optimization_mode=options.mode),
            float16=options.precision == "float16",
        )
    file = RESULTS / f"{NAME}.json"
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
    rows[f"{options.precision}, mode {options.mode}"] = {
        "target": made.soc,
        "arch": made.arch,
        "sdk": made.sdk,
        "seconds": round(made.seconds, 1),
        "peak_bytes": made.peak_bytes,
        "binary_bytes": made.bytes,
        "dram_read": made.dram.read if made.dram else None,
        "dram_written": made.dram.written if made.dram else None,
        "note": options.note,
    }
    print(write_result(NAME, {"preset": artifact.manifest.model["name"], "rows": rows}))


if __name__ == "__main__":
    main()
