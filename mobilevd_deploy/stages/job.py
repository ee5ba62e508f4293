"""What the stages of one export share: the job, and `Stage`, the entries of deploy.py's table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobilevd_deploy.artifact.manifest import Component, PassReport
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.processes import Steps
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.base.tensors import Array, Tensors, sqnr_db
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.spec import ComponentName, ModelSpec
from mobilevd_deploy.errors import ParityError
from mobilevd_deploy.model.checkpoint import Checkpoint
from mobilevd_deploy.npu.onnx_export import DATA, MODEL
from mobilevd_deploy.quantize.calibration import JUDGES, Pictures
from mobilevd_deploy.runtime.pipeline import ClipJob
from mobilevd_deploy.runtime.runners import OnnxRunner
from mobilevd_deploy.stages.records import Pieces, StageOutput

JUDGE_ALL_UP_TO_FLOPS = 100e9
"""A component with more FLOPs is judged on one picture, and its blocks are not judged one by one.

At the paper's size a run of the UNet's simulation takes a minute.
"""

MORE_PICTURES_OR_BITS = "calibrate with more pictures, or keep layers at 16 bit with quant.rules"


@dataclass
class ExportJob:
    """One export: its inputs, and the results of its stages so far.

    Attributes:
        checkpoint, recipe: what is exported, and how.
        pictures: calibration pictures; the last `JUDGES` only judge. None for a float export.
        folder: where the artifact is built.
        components: manifest entries of the exported components; later stages add to them.
        drift: SQNR in dB by stage and component, None for identical outputs.
        passes: reports of the UNet's rewrites.
        magnitudes: largest magnitude of each layer's output by component, for float16.
        conditioning, sensitivity, clip_psnr_db: as in the manifest's `Quality`.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    pictures: Pictures | None
    folder: PartialArtifact
    components: dict[ComponentName, Component] = field(default_factory=dict)
    drift: dict[str, dict[str, float | None]] = field(default_factory=dict)
    passes: tuple[PassReport, ...] = ()
    magnitudes: dict[str, dict[str, float]] = field(default_factory=dict)
    conditioning: dict[str, dict[str, float]] = field(default_factory=dict)
    sensitivity: dict[str, dict[str, float | None]] = field(default_factory=dict)
    clip_psnr_db: float | None = None

    @property
    def spec(self) -> ModelSpec:
        """The model's configuration."""
        return self.checkpoint.spec

    # ---- places ----

    def float_folder(self, name: str) -> Path:
        """Folder of a component's float graph."""
        return self.folder.artifact / name

    def quantised_folder(self, name: str) -> Path:
        """Folder of a component's quantised graph."""
        return self.folder.artifact / name / "quantised"

    def graph_to_compile(self, name: str) -> Path:
        """File of the graph that the compiler takes: quantised where the recipe quantises."""
        folder = self.quantised_folder(name) if self.recipe.quant else self.float_folder(name)
        return folder / MODEL

    def sample_path(self, index: int) -> Path:
        """File of a picture and the outputs of every float component for it."""
        return self.folder.work / "calibration" / f"{index}.npz"

    def simulated_path(self, name: str) -> Path:
        """File of the output of AIMET's simulation of a component for the first judge."""
        return self.folder.work / name / "simulated.npz"

    # ---- pictures that calibrate, and pictures that judge ----

    def sample_paths(self) -> list[Path]:
        """List the files of all pictures in order."""
        return sorted((self.folder.work / "calibration").glob("*.npz"), key=lambda path: int(path.stem))

    def load_sample(self, path: Path) -> ClipJob:
        """Read a picture and the float outputs for it."""
        with np.load(path) as arrays:
            outputs = {name: arrays[name] for name in arrays.files if name != "image"}
            return ClipJob(arrays["image"], int(path.stem), outputs)

    def calibration_inputs(self, component: Component) -> Iterator[Tensors]:
        """Yield a component's inputs for each picture that calibrates, read one at a time."""
        for path in self.sample_paths()[:-JUDGES]:
            yield self.load_sample(path).feeds(component)

    def judges(self) -> list[ClipJob]:
        """Read the pictures that judge, with the float outputs."""
        return [self.load_sample(path) for path in self.sample_paths()[-JUDGES:]]

    def judged(self, component: Component) -> tuple[list[Tensors], list[Array]]:
        """Return the inputs for every judge, and the float outputs for the judges of this component."""
        judges = self.judges()
        count = 1 if component.flops > JUDGE_ALL_UP_TO_FLOPS else len(judges)
        exact = [judge.outputs[component.name] for judge in judges[:count]]
        return [judge.feeds(component) for judge in judges], exact

    # ---- floors ----

    def require_agreement(self, component: Component, what: str, given: Array, drift: float) -> float:
        """Raise ParityError unless an output for the first judge is close enough to its reference.

        The reference and the floor are those of `Recipe.agreement_floor`: AIMET's simulation, or the float
        run, to which the output's SQNR is `drift` (dB). Returns the SQNR against AIMET in dB, for the record.
        """
        reference, floor = self.recipe.agreement_floor(component.name)
        with np.load(self.simulated_path(component.name)) as expected:
            agreement = sqnr_db(expected["given"], given)
        compared = ("AIMET", agreement) if reference == "quantised" else ("float", drift)
        require(component.name, f"{what} vs {compared[0]}", compared[1], floor)
        return agreement


@dataclass(frozen=True)
class StageContext:
    """What a stage runs with: steps in child processes, pieces that a later run can reuse, and progress."""

    steps: Steps
    pieces: Pieces
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """One resumable stage of an export.

    Attributes:
        name: unique in the export.
        share: relative time, in any unit, for the estimate of the time left.
        inputs: plain values that decide the result, apart from the checkpoint and the stages before.
        act: does the work: act(job, context, *arguments).
        note: adds the stage's values, new or from an earlier run, to the job: note(job, values, *arguments).
        arguments: component and chip.
        disk_bytes: estimate of what `act` and the later stages write.
    """

    name: str
    share: float
    inputs: Mapping[str, Any]
    act: Callable[..., StageOutput]
    note: Callable[..., None]
    arguments: tuple[str, ...] = ()
    disk_bytes: int = 0


def graph_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of an ONNX graph that exist in `folder`."""
    return tuple(path for path in (folder / MODEL, folder / DATA) if path.exists())


def runs_graph(folder: Path, component: Component) -> Callable[[Tensors], Array]:
    """Return a function that runs a component's graph on onnxruntime and gives its output."""
    session, output = OnnxRunner(folder / MODEL), component.outputs[0].name
    return lambda values: session.run(values)[output]


def require(name: str, what: str, value: float, floor: float) -> None:
    """Raise ParityError unless an SQNR in dB reaches its floor."""
    if not value >= floor:
        raise ParityError(
            f"{name}: {what}: {value:.1f} dB SQNR, the floor is {floor:g} dB",
            next_step=MORE_PICTURES_OR_BITS,
        )


def json_number(value: float) -> float | None:
    """Return None for infinity, which identical outputs have and JSON cannot hold."""
    return None if value == math.inf else value
