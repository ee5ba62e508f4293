"""Fixed inputs, their reference outputs, and the SQNR of other outputs against the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mobilevd_deploy.base.tensors import Tensors, sqnr_db
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.model.interface import TensorSpec
from mobilevd_deploy.runtime.noise import uniform, unit_noise


@dataclass(frozen=True)
class Probe:
    """Inputs by name, and the outputs of the trained network for them."""

    inputs: Tensors
    reference: Tensors

    def drift(self, outputs: Mapping[str, npt.ArrayLike]) -> float:
        """Return the lowest SQNR in dB of `outputs` against the reference.

        Raises UsageError if the names of the outputs differ.
        """
        if set(outputs) != set(self.reference):
            raise UsageError(f"outputs {sorted(outputs)} are not the reference's {sorted(self.reference)}")
        return min(sqnr_db(reference, outputs[name]) for name, reference in self.reference.items())


def make_probe(
    inputs: Sequence[TensorSpec],
    seed: int,
    reference: Callable[[Tensors], Mapping[str, npt.ArrayLike]],
    given: Mapping[str, npt.NDArray[np.generic]] | None = None,
) -> Probe:
    """Make inputs from `seed`, run `reference` on them and keep both.

    Inputs in `given` are taken from there. Of the others, input i uses noise stream i: uniform over the
    spec's range if it has one, else standard normal.
    """
    values: Tensors = {}
    for stream, spec in enumerate(inputs):
        if given is not None and spec.name in given:
            value: npt.NDArray[np.generic] = given[spec.name]
        elif spec.range is None:
            value = unit_noise(seed, stream, spec.shape)
        else:
            low, high = spec.range
            value = low + (high - low) * uniform(seed, stream, spec.shape)
        values[spec.name] = value.astype(spec.dtype)
    return Probe(values, {name: np.asarray(value) for name, value in reference(values).items()})
