"""FLOPs of the paper's ablation, published and counted: writes results/flops_ladder.json, prints a table.

    python benchmarks/flops_ladder.py

Counts on module trees without weights: 30 s, no GPU, no downloads.
"""

from __future__ import annotations

from _common import write_result
from rich.console import Console

from mobilevd_deploy.cli.tables import render_ladder
from mobilevd_deploy.inspection import LADDER_NOTES, ladder


def main() -> None:
    """Count all rows, write them with the notes that explain the deviations, and print them."""
    rows = ladder()
    Console().print(render_ladder(rows))
    write_result("flops_ladder", {"rows": rows, "notes": list(LADDER_NOTES)})


if __name__ == "__main__":
    main()
