"""Compare a quantised component with its float form, by input and by block.

answers        how far the output moves when one input changes
conditioning   the same, relative to the float network
sensitivity    the SQNR with only one block quantised
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.base.tensors import Array, Tensors, sqnr_db
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.quantize.simulation import Quantised, block_of

Runner = Callable[[Tensors], npt.ArrayLike]


def answers(run: Runner, samples: Sequence[Tensors], given: Sequence[Array]) -> dict[str, float]:
    """Return by input how far the output of `run` moves, as RMS, when only this input is from another sample.

    `given` holds the outputs of `run` for the first samples. Each of these samples takes the input from the
    sample after it. Raises UsageError for fewer than two samples.
    """
    if len(samples) < 2:
        raise UsageError("conditioning needs two samples or more")
    squares = dict.fromkeys(samples[0], 0.0)
    for i, base in enumerate(given):
        sample, other = samples[i], samples[(i + 1) % len(samples)]
        for name in squares:
            changed = np.asarray(run(sample | {name: other[name]}), np.float64) - base
            squares[name] += float(np.sum(changed * changed))
    sizes = sum(base.size for base in given)
    return {name: math.sqrt(square / sizes) for name, square in squares.items()}


def conditioning(given: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float]:
    """Return by input how far the output of a network moves relative to the reference; see `answers`.

    1 is perfect; 0 is an input without any effect. If the output of the reference does not move, it is 1 if
    the network's does not move either, else inf.
    """
    return {name: _ratio(value, reference[name]) for name, value in given.items()}


def _ratio(value: float, reference: float) -> float:
    if reference:
        return value / reference
    return math.inf if value else 1.0


def sensitivity(quantised: Quantised, inputs: Tensors) -> dict[str, float]:
    """Return by block the SQNR in dB of the output with only that block quantised, lowest first.

    A block is a resblock, transformer or layer with all its modules, or a module outside of these. Ranges
    stay as they are. A block that changes nothing has inf.
    """
    reference = quantised.run_float(inputs)
    alone: dict[str, float] = {}
    for block in dict.fromkeys(block_of(path) for path, _ in quantised.sim.named_qmodules()):
        with quantised._without(lambda path, block=block: block_of(path) != block):  # type: ignore[misc]
            alone[block] = sqnr_db(reference, quantised.run(inputs))
    return dict(sorted(alone.items(), key=lambda item: item[1]))
