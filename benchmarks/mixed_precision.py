"""Quality against cost as blocks of the demo's UNet change from 8 to 16 bits.

    python benchmarks/mixed_precision.py [--work build/tune] [--budget 1.1]

Runs `tune` within a budget of bit operations. Writes each step with its predicted and its simulated SQNR to
results/mixed_precision.json, and as an image to mixed_precision.svg. Measurements stay in the work folder, so
an interrupted run resumes. Takes some minutes on two idle cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from _common import RESULTS, write_result

from mobilevd_deploy.base.progress import make_progress
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.tune import Step, Tuned, tune

RESULT = "mixed_precision"
WIDTH, HEIGHT, EDGE = 720, 360, 60
COLOURS = {"simulated": "#4a7ebb", "predicted": "#d0743c"}


def main() -> None:
    """Search, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tune"))
    parser.add_argument("--budget", type=float, default=1.1)
    arguments = parser.parse_args()

    arguments.work.mkdir(parents=True, exist_ok=True)
    with make_progress() as progress:
        tuned = tune(
            data_dir("models") / "demo.safetensors",
            load_recipe("xiaomi-14-pro"),
            arguments.work / "tuned.toml",
            progress,
            budget=arguments.budget,
        )
    values = tuned.to_dict()
    del values["recipe"]
    write_result(RESULT, {"budget": arguments.budget, "unit": "bit operations of W8A16 throughout"} | values)
    (RESULTS / f"{RESULT}.svg").write_text(draw(tuned), encoding="utf-8")
    for step in tuned.steps:
        figures = f"{step.bit_operations:8.3f}{step.predicted_db:8.1f}{step.measured_db:8.1f} dB"
        print(f"{figures}  {step.block} w{step.weights}a{step.activations}")


def draw(tuned: Tuned) -> str:
    """Return an SVG image: SQNR over bit operations, simulated and predicted."""
    steps = tuned.steps
    prices = [step.bit_operations for step in steps]
    decibels = [db for step in steps for db in (step.predicted_db, step.measured_db) if db is not None]
    x, y = scale(prices, EDGE, WIDTH - EDGE), scale(decibels, HEIGHT - EDGE, EDGE)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{EDGE}" y="24">UNet of the demo: SQNR in dB over bit operations (1: W8A16)</text>',
        f'<path d="M{EDGE} {EDGE}V{HEIGHT - EDGE}H{WIDTH - EDGE}" fill="none" stroke="#888"/>',
    ]
    for db in (min(decibels), max(decibels)):
        lines.append(f'<text x="{EDGE - 6}" y="{y(db) + 4:.1f}" text-anchor="end">{db:.1f}</text>')
    for price in (min(prices), max(prices)):
        lines.append(
            f'<text x="{x(price):.1f}" y="{HEIGHT - EDGE + 18}" text-anchor="middle">{price:.2f}</text>'
        )
    for number, (name, colour) in enumerate(COLOURS.items()):
        pairs = ((step.bit_operations, value(step, name)) for step in steps)
        points = " ".join(f"{x(price):.1f},{y(db):.1f}" for price, db in pairs if db is not None)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(
            f'<text x="{WIDTH - 160}" y="{HEIGHT - 100 + 18 * number}" fill="{colour}">{name}</text>'
        )
    return "\n".join((*lines, "</svg>", ""))


def value(step: Step, name: str) -> float | None:
    """Return the "predicted" or "simulated" SQNR of a step in dB."""
    return step.predicted_db if name == "predicted" else step.measured_db


def scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Map the smallest of `values` to `first` and the largest to `last`."""
    low, high = min(values), max(values)
    return lambda one: first + (last - first) * (one - low) / ((high - low) or 1)


if __name__ == "__main__":
    main()
