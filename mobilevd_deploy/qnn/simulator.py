"""Run context binaries on Qualcomm's x86 simulator of the HTP."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.qnn.process import check_installed, run_child

if TYPE_CHECKING:
    from mobilevd_deploy.base.tensors import Array


SIMULATE_UP_TO_FLOPS = 20e9
"""A component with more FLOPs is not simulated: on two cores its run would take minutes to days."""


class NpuSimRunner:
    """Runs a context binary on the simulator of the NPU, which computes like the chip but far slower.

    Needs the files of `compile_context`: the wrapper, and the binary in the same folder. Each call starts a
    process, without a time limit: the caller decides what is too large (`SIMULATE_UP_TO_FLOPS`).
    """

    def __init__(self, wrapper: Path) -> None:
        check_installed()
        if not wrapper.is_file():
            raise UsageError(f"{wrapper} does not exist", next_step="compile it first")
        self._wrapper = wrapper

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Map inputs by name to outputs by name. Raises VendorError, ResourceError."""
        import numpy as np

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for i, value in enumerate(feeds.values()):
                np.save(folder / f"in{i}.npy", value)
            job = {"model": str(self._wrapper.resolve()), "options": {}, "feeds": list(feeds)}
            ran = run_child(f"simulating {self._wrapper}", job, folder, None, math.inf)
            return {key: np.load(folder / f"out{i}.npy") for i, key in enumerate(ran.result["outputs"])}
