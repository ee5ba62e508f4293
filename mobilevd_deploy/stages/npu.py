"""From float ONNX to proven context binaries: what deploy() adds where a recipe has `quant` or `npu`.

    calibrate          run the float graphs on pictures, keep what every component gave
    quantise <name>    AIMET, judged on pictures that did not calibrate; so is the graph that it wrote
    judge clip         the quantised graphs in a row against the float clip
    ranges <name>      instead of these two, for float16: how large do values get?
    compile <name>     one QNN context binary for each target, read back
    simulate <name>    the binaries on the HTP simulator against what they should give

Every one is a resumable stage. With `npu` and no `quant` the float graphs are compiled, in float16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mobilevd_deploy.artifact.manifest import Component, FileEntry, NpuBinary, NpuPart, Quality
from mobilevd_deploy.artifact.partial import PartialArtifact
from mobilevd_deploy.base.processes import StageCost, Steps, memory_bytes, side_by_side
from mobilevd_deploy.base.progress import Progress, shares
from mobilevd_deploy.base.tensors import Tensors, psnr_db, sqnr_db
from mobilevd_deploy.config.recipe import Recipe
from mobilevd_deploy.config.spec import ComponentName
from mobilevd_deploy.errors import ExportError, ParityError
from mobilevd_deploy.npu.onnx_export import DATA, MODEL
from mobilevd_deploy.qnn.compiled import check_graph
from mobilevd_deploy.qnn.compiler import compile_context
from mobilevd_deploy.qnn.lint import lint
from mobilevd_deploy.qnn.simulator import SIMULATE_UP_TO_FLOPS, NpuSimRunner
from mobilevd_deploy.qnn.split import (
    Cut,
    compiler_bytes,
    compiler_work,
    fewest_parts,
    plan_cut,
    read_shaped,
    write_parts,
)
from mobilevd_deploy.qnn.targets import find_target
from mobilevd_deploy.quantize.calibration import JUDGES, Pictures
from mobilevd_deploy.quantize.judging import answers, conditioning, sensitivity
from mobilevd_deploy.quantize.simulation import quantise
from mobilevd_deploy.runtime.media import to_uint8, write_sheet
from mobilevd_deploy.runtime.pipeline import ClipJob, run_component
from mobilevd_deploy.runtime.runners import OnnxRunner, PartsRunner
from mobilevd_deploy.stages.records import Pieces, StageOutput, StageRecord, Stages

JUDGE_ALL_UP_TO_FLOPS = 100e9
"""A component with more is judged on one picture, and not block by block: at the paper's size a run of the
UNet's simulation takes a minute, and its encoders have dozens of blocks too."""

SHEET = "sheet.png"
"""In the work folder: input, float clip and quantised clip of the first judge, for the report."""

_QUANTISED = "quantised"
_ENCODINGS = "encodings.pt"


@dataclass(frozen=True)
class NpuResult:
    """The components with what was added, drifts by stage, what quantisation cost, and how it looks."""

    components: tuple[Component, ...]
    drift: dict[str, dict[str, float | None]]
    quality: Quality | None
    sheet: bytes | None


def plan(recipe: Recipe, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the stages that `run` will add, each with its share of the time."""
    shares: dict[str, float] = {}
    if recipe.quant or recipe.npu:
        shares["calibrate"] = 1
    if recipe.quant:
        shares |= {f"quantise {name}": 3 * weight for name, weight in weights.items()} | {"judge clip": 1}
    elif recipe.npu:
        shares |= {f"ranges {name}": weight for name, weight in weights.items()}
    for target in recipe.npu.targets if recipe.npu else ():
        shares |= {f"compile {name} {target}": 3 * weight for name, weight in weights.items()}
        shares |= {f"simulate {name} {target}": weight for name, weight in weights.items()}
    return shares


def run(
    recipe: Recipe,
    components: Sequence[Component],
    build: Callable[[ComponentName], nn.Module],
    pictures: Pictures,
    folder: PartialArtifact,
    stages: Stages,
    progress: Progress,
    *,
    apart: bool,
) -> NpuResult:
    """Quantise, compile and simulate as the recipe says.

    Args:
        recipe: with `quant`, `npu`, or both.
        components: entries of the float export, whose files lie in `folder.artifact`.
        build: makes a component's deploy form anew; has to be picklable if `apart`.
        pictures: calibration pictures, the last `JUDGES` of them for judging.
        folder: of the artifact that is being built.
        stages: those of the export have run.
        progress: told about every stage.
        apart: run every stage in a process of its own.

    Raises:
        ParityError: below one of the recipe's floors. ExportError, VendorError: see quantize.py and qnn.py.
    """
    flow = _Flow(recipe, tuple(components), build, folder)

    def run_stage(
        name: str, inputs: Mapping[str, Any], action: Callable[..., StageOutput], *args: Any
    ) -> Any:
        def act() -> StageOutput:
            steps = Steps(apart, progress)
            output = steps.run("rest", action, *args)
            return dataclasses.replace(output, steps=output.steps | steps.costs)

        return stages.run(name, inputs, act).values

    def calibrate() -> StageOutput:
        costs: dict[str, StageCost] = {}
        for c, share in zip(components, shares(progress, [c.flops for c in components]), strict=True):
            steps = Steps(apart, share)
            files = steps.run(c.name, flow.answer, c, pictures)
            costs |= steps.costs
        return StageOutput(files, steps=costs)

    def quantise_stage(component: Component) -> StageOutput:
        steps = Steps(apart, progress)
        output = steps.run("AIMET", flow.quantise, component)
        # Two processes, because onnxruntime keeps what it held: 17.7 GB for both graphs of the paper's UNet.
        quantised = steps.run("judge quantised", flow.answers_of_quantised, component)
        ratios = conditioning(quantised, steps.run("judge float", flow.answers_of_float, component))
        flow.require_conditioning(component, ratios)
        return StageOutput(output.files, output.values | {"conditioning": ratios}, steps.costs)

    stages.run("calibrate", {"pictures": pictures.sha256}, calibrate)
    drift: dict[str, dict[str, float | None]] = {}
    found = {component.name: component for component in components}
    quality = None
    if recipe.quant:
        scheme = {"quant": dataclasses.asdict(recipe.quant), "floors": dataclasses.asdict(recipe.floors)}
        records = {
            c.name: stages.run(f"quantise {c.name}", scheme, functools.partial(quantise_stage, c)).values
            for c in components
        }
        drift["quantised"] = {name: record["drift"] for name, record in records.items()}
        clip = run_stage("judge clip", scheme, flow.judge_clip)["psnr_db"]
        quality = Quality(
            pictures.source,
            len(pictures.values) - JUDGES,
            pictures.sha256,
            clip,
            {name: record["conditioning"] for name, record in records.items()},
            {name: record["sensitivity"] for name, record in records.items()},
        )
        found = {name: flow.with_quantised(component) for name, component in found.items()}
        peaks: dict[str, dict[str, float]] = {}
    else:
        peaks = {c.name: run_stage(f"ranges {c.name}", {}, flow.measure_ranges, c) for c in components}
    for target in recipe.npu.targets if recipe.npu else ():
        for c in components:
            assert recipe.npu is not None
            options = {"npu": recipe.npu.deciding(target)}
            ranges = peaks.get(c.name, {})
            stage = f"compile {c.name} {target}"
            pieces = stages.pieces(stage, options)
            compiled = run_stage(stage, options, flow.compile, c, target, ranges, pieces)
            binary = flow.binary(c, target, compiled)
            found[c.name] = dataclasses.replace(found[c.name], npu=(*found[c.name].npu, binary))
            floors = {"floors": dataclasses.asdict(recipe.floors)}
            proof = run_stage(f"simulate {c.name} {target}", floors, flow.simulate, found[c.name], target)
            if proof["simulated"]:
                drift.setdefault(f"npu.{target}", {})[c.name] = proof["drift"]
    sheet = (folder.work / SHEET).read_bytes() if recipe.quant else None
    return NpuResult(tuple(found[c.name] for c in components), drift, quality, sheet)


@dataclass(frozen=True)
class _Flow:
    recipe: Recipe
    components: tuple[Component, ...]
    build: Callable[[ComponentName], nn.Module]
    folder: PartialArtifact

    # ---- stages ----

    def answer(self, component: Component, pictures: Pictures, progress: Progress) -> tuple[Path, ...]:
        """Run one float component on every picture; a file per picture holds it and all outputs so far."""
        is_first, count = component == self.components[0], len(pictures.values)
        runner = self._float_runner(component)
        for index in range(count):
            path = self._sample_path(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            job = ClipJob(pictures.values[index], index) if is_first else self._load(path)
            run_component(component, lambda _: runner, [job])
            arrays: dict[str, Any] = {"image": job.image, **job.outputs}
            np.savez(path, **arrays)
            progress.advance((index + 1) / count)
        return tuple(self._sample_path(index) for index in range(count))

    def quantise(self, component: Component, progress: Progress) -> StageOutput:
        """Quantise one component, judge it, write its QDQ graph and what it gave for the first judge."""
        assert self.recipe.quant is not None
        name, output = component.name, component.outputs[0].name
        state = self.folder.work / name / _ENCODINGS
        state.parent.mkdir(parents=True, exist_ok=True)
        quantised = quantise(
            self.build(cast(ComponentName, name)),
            self._feeds(component),
            self.recipe.quant.of(name),
            state=state,
        )
        feeds, exact = self._judged(component)
        progress.advance(0.4)
        given = [quantised.run(values) for values in feeds[: len(exact)]]
        drift = min(sqnr_db(expected, out) for expected, out in zip(exact, given, strict=True))
        self._require(name, "the quantised network", drift, self.recipe.floors.quantised_sqnr_db)
        progress.advance(0.5)
        quantised.export(self._quantised(name), feeds[0], [output])
        expected = self._expected_path(name)
        np.savez(expected, given=given[0])
        large = component.flops > JUDGE_ALL_UP_TO_FLOPS
        alone = {} if large else sensitivity(quantised, feeds[0])
        blocks = {block: _plain(drift) for block, drift in alone.items()}
        return StageOutput(
            (*self._existing(self._quantised(name)), expected),
            {"drift": _plain(drift), "sensitivity": blocks},
        )

    def answers_of_quantised(self, component: Component, _: Progress) -> dict[str, float]:
        """Run the QDQ graph, hold it against AIMET's simulation, and return its answers to each input.

        onnxruntime is faster than AIMET, and this is the graph that is compiled.
        """
        feeds, exact = self._judged(component)
        run = self._run(self._quantised(component.name), component)
        given = [run(values) for values in feeds[: len(exact)]]
        drift = min(sqnr_db(expected, out) for expected, out in zip(exact, given, strict=True))
        self._require_agreement(component, "the written graph", given[0], drift)
        return answers(run, feeds, given)

    def answers_of_float(self, component: Component, _: Progress) -> dict[str, float]:
        """Return the answers of the float graph to each input."""
        feeds, exact = self._judged(component)
        return answers(self._run(self.folder.artifact / component.name, component), feeds, exact)

    def require_conditioning(self, component: Component, ratios: Mapping[str, float]) -> None:
        """Refuse a component in which an input no longer matters as it did."""
        floor = self.recipe.floors.conditioning
        for tensor, ratio in ratios.items():
            if not floor <= ratio <= 1 / floor:
                raise ParityError(
                    f"{component.name}: when {tensor} changes, the quantised output moves {ratio:.2f} times "
                    f"as far as the float one; from {floor:g} to {1 / floor:.2f} is allowed",
                    next_step="calibrate with more pictures, or keep layers at 16 bit with quant.rules",
                )

    def judge_clip(self, _: Progress) -> StageOutput:
        """Run the quantised graphs one after the other and compare the clip with the float clip."""
        last, judges = self.components[-1].name, self._judges()
        if max(component.flops for component in self.components) > JUDGE_ALL_UP_TO_FLOPS:
            judges = judges[:1]
        jobs = [ClipJob(judge.image, judge.seed) for judge in judges]
        for component in self.components:
            run_component(component, lambda c: OnnxRunner(self._quantised(c.name) / MODEL), jobs)
        clips = [(judge.outputs[last], job.outputs[last]) for judge, job in zip(judges, jobs, strict=True)]
        worst = min(psnr_db(exact, quantised, peak=2.0) for exact, quantised in clips)
        floor = self.recipe.floors.clip_psnr_db
        if not worst >= floor:
            raise ParityError(
                f"the quantised clip is {worst:.1f} dB PSNR from the float clip, the floor is {floor:g} dB",
                next_step="calibrate with more pictures, or keep layers at 16 bit with quant.rules",
            )
        sheet = self.folder.work / SHEET
        rows = [("input", to_uint8(judges[0].image))]
        for label, clip in zip(("float", "quantised"), clips[0], strict=True):
            rows.append((label, to_uint8(clip)[:: max(1, len(clip) // 7)]))
        write_sheet(rows, sheet)
        return StageOutput((sheet,), {"psnr_db": _plain(worst)})

    def measure_ranges(self, component: Component, _: Progress) -> StageOutput:
        """Note the largest magnitude of each layer's output over all pictures, which float16 has to hold."""
        network = self.build(cast(ComponentName, component.name))
        samples = (self._load(path).feeds(component) for path in self._jobs())
        return StageOutput((), largest_magnitudes(network, samples))

    def compile(
        self,
        component: Component,
        target: str,
        peaks: Mapping[str, float],
        pieces: Pieces,
        progress: Progress,
    ) -> StageOutput:
        """Compile one component for one chip; `peaks` is what `lint` wants. A finished part is a piece."""
        assert self.recipe.npu is not None
        npu, chip, quantised = self.recipe.npu, find_target(target), self.recipe.quant is not None
        model = self._quantised(component.name) if quantised else self.folder.artifact / component.name
        for finding in lint(model / MODEL, float16=not quantised, vtcm_mb=npu.vtcm_mb, peaks=peaks):
            if finding.next_step:
                raise ExportError(f"{component.name}: {finding}", next_step=finding.next_step)
            progress.say(f"{component.name}: {finding}")
        # What a rule leaves in floats is an island on purpose.
        rules = self.recipe.quant.of(component.name).rules if self.recipe.quant else ()
        floats = [f"{rule.modules}/*" for rule in rules if 32 in (rule.weights, rule.activations)]
        root = self.folder.artifact / component.name / target

        def compile_part(path: Path, part: str, share: Progress, stop: threading.Event) -> StageRecord:
            folder = root / part.replace(" ", "")

            def act() -> StageOutput:
                made = compile_context(
                    path, folder, chip, npu, float16=not quantised, progress=share, stop=stop
                )
                check_graph(made.graph, self._precision, [*npu.allow, *floats])
                values = {
                    "folder": folder.relative_to(self.folder.artifact).as_posix(),
                    "arch": made.arch,
                    "qnn_api": made.qnn_api,
                    "sdk": made.sdk,
                    "dram_read": made.dram.read if made.dram else None,
                    "dram_written": made.dram.written if made.dram else None,
                }
                step = f"compiler part {part}" if part else "compiler"
                cost = StageCost(round(made.seconds, 3), made.peak_bytes)
                return StageOutput((made.wrapper, made.context), values, {step: cost})

            record = pieces.run(f"part {part or 1}", act, share)
            share.advance(1)
            return record

        with self._cut(component, model / MODEL, pieces, progress) as cut:
            names = [f"{n} of {len(cut)}" if len(cut) > 1 else "" for n in range(1, len(cut) + 1)]
            graphs = [read_shaped(path) for path, _, _ in cut]
            needed = [compiler_bytes(graph, 4 if quantised else 2) for graph in graphs]
            work = [compiler_work(graph) for graph in graphs]
            tasks = [
                functools.partial(compile_part, path, name, share)
                for (path, _, _), name, share in zip(cut, names, shares(progress, work), strict=True)
            ]
            # The compiler has one thread for most of its time.
            made = side_by_side(tasks, needed, work, budget=memory_bytes()[1], workers=os.cpu_count() or 1)
        parts = [
            record.values | {"inputs": inputs, "outputs": outputs}
            for record, (_, inputs, outputs) in zip(made, cut, strict=True)
        ]
        files = [self.folder.root / file.path for record in made for file in record.files]
        steps = {step: cost for record in made for step, cost in record.steps.items()}
        return StageOutput(tuple(files), {"parts": parts}, steps)

    @contextlib.contextmanager
    def _cut(
        self, component: Component, model: Path, pieces: Pieces, progress: Progress
    ) -> Iterator[list[tuple[Path, list[str], list[str]]]]:
        """Yield the files to compile with their inputs and outputs: the model, or proven parts of it."""
        assert self.recipe.npu is not None
        quantised = self.recipe.quant is not None
        whole = read_shaped(model)
        count = self.recipe.npu.parts if component.name == "unet" else 0
        count = count or fewest_parts(whole, float_bytes=4 if quantised else 2)
        if count == 1:
            yield [(model, [t.name for t in component.inputs], [t.name for t in component.outputs])]
            return
        cut = plan_cut(whole, count)
        crossing = ", ".join(f"{size / 1e6:.1f} MB" for size in cut.crossing_bytes)
        progress.say(f"{component.name}: cut into {count} parts; {crossing} cross, as float32")
        files = write_parts(model, cut)
        try:
            pieces.run("row of parts", lambda: self._check_parts(component, files, cut), progress)
            yield [(f, [*part.inputs], [*part.outputs]) for f, part in zip(files, cut.parts, strict=True)]
        finally:
            for file in files:
                file.unlink()

    def _check_parts(self, component: Component, files: Sequence[Path], cut: Cut) -> StageOutput:
        """Run the parts in a row on onnxruntime and compare with what the whole gave."""
        judge, output = self._judges()[0], component.outputs[0].name
        chain = PartsRunner(cut.parts, lambda part: OnnxRunner(files[cut.parts.index(part)]))
        given = chain.run(judge.feeds(component))[output]
        drift, what = sqnr_db(judge.outputs[component.name], given), "the row of its parts"
        if self.recipe.quant is None:
            self._require(component.name, what, drift, self.recipe.floors.onnx_sqnr_db)
        else:
            self._require_agreement(component, what, given, drift)
        return StageOutput()

    def simulate(self, component: Component, target: str, progress: Progress) -> StageOutput:
        """Run one binary on the simulator, on the first judge; compare with AIMET and with the float run."""
        if component.flops > SIMULATE_UP_TO_FLOPS:
            progress.say(
                f"{component.name}: not simulated, {component.flops / 1e9:.0f} GFLOPs are too many for it"
            )
            return StageOutput((), {"simulated": False})
        output, judge = component.outputs[0].name, self._judges()[0]
        root, (binary,) = self.folder.artifact, (b for b in component.npu if b.target == target)
        runner = PartsRunner(binary.parts, lambda part: NpuSimRunner(root / part.files["wrapper"].path))
        given = runner.run(judge.feeds(component))[output]
        drift = sqnr_db(judge.outputs[component.name], given)
        agreement = None
        if self.recipe.quant is None:
            floor = self.recipe.floors.float16_sqnr_db
            self._require(component.name, "the simulator's float16", drift, floor)
        else:
            agreement = _plain(self._require_agreement(component, "the simulator", given, drift))
        return StageOutput((), {"simulated": True, "drift": _plain(drift), "agreement": agreement})

    # ---- entries ----

    def with_quantised(self, component: Component) -> Component:
        """Add the quantised graph's files."""
        root = self.folder.artifact
        roles = {MODEL: _QUANTISED, DATA: f"{_QUANTISED}_data"}
        files = {
            roles[path.name]: FileEntry.of(root, path)
            for path in self._existing(self._quantised(component.name))
        }
        return dataclasses.replace(component, files=component.files | files)

    def binary(self, component: Component, target: str, values: Mapping[str, Any]) -> NpuBinary:
        """Describe what was compiled."""
        root, first = self.folder.artifact, values["parts"][0]
        parts = []
        for part in values["parts"]:
            roles = {"wrapper": f"{target}.onnx", "context": f"{target}.bin"}
            files = {role: FileEntry.of(root, root / part["folder"] / name) for role, name in roles.items()}
            wiring = tuple(part["inputs"]), tuple(part["outputs"])
            parts.append(NpuPart(files, *wiring, part["dram_read"], part["dram_written"]))
        return NpuBinary(target, first["arch"], self._precision, first["qnn_api"], first["sdk"], tuple(parts))

    # ---- parts ----

    @property
    def _precision(self) -> str:
        return self.recipe.quant.precision if self.recipe.quant else "float16"

    def _float_runner(self, component: Component) -> OnnxRunner:
        return OnnxRunner(self.folder.artifact / component.name / MODEL)

    def _quantised(self, name: str) -> Path:
        return self.folder.artifact / name / _QUANTISED

    def _existing(self, folder: Path) -> tuple[Path, ...]:
        return tuple(path for path in (folder / MODEL, folder / DATA) if path.exists())

    def _sample_path(self, index: int) -> Path:
        return self.folder.work / "calibration" / f"{index}.npz"

    def _expected_path(self, name: str) -> Path:
        return self.folder.work / name / "simulated.npz"

    def _jobs(self) -> list[Path]:
        return sorted((self.folder.work / "calibration").glob("*.npz"), key=lambda path: int(path.stem))

    def _load(self, path: Path) -> ClipJob:
        with np.load(path) as arrays:
            outputs = {name: arrays[name] for name in arrays.files if name != "image"}
            return ClipJob(arrays["image"], int(path.stem), outputs)

    def _feeds(self, component: Component) -> Iterator[Tensors]:
        """Inputs of the pictures that calibrate, one at a time."""
        for path in self._jobs()[:-JUDGES]:
            yield self._load(path).feeds(component)

    def _judges(self) -> list[ClipJob]:
        return [self._load(path) for path in self._jobs()[-JUDGES:]]

    def _judged(self, component: Component) -> tuple[list[Tensors], list[Any]]:
        """Return every judge's inputs, and the float outputs of those that judge this component."""
        judges = self._judges()
        count = 1 if component.flops > JUDGE_ALL_UP_TO_FLOPS else len(judges)
        exact = [job.outputs[component.name] for job in judges[:count]]
        return [job.feeds(component) for job in judges], exact

    def _run(self, folder: Path, component: Component) -> Callable[[Tensors], Any]:
        """Return what runs a component's graph and gives its output."""
        session, output = OnnxRunner(folder / MODEL), component.outputs[0].name
        return lambda values: session.run(values)[output]

    def _require_agreement(self, component: Component, what: str, given: Any, drift: float) -> float:
        """Hold what `component` gave for the first judge against AIMET's simulation; return their SQNR in dB.

        `drift`: its SQNR against the float run, which is all that means something at 8 bits, where rounding
        flips spread.
        """
        assert self.recipe.quant is not None
        floors = self.recipe.floors
        with np.load(self._expected_path(component.name)) as expected:
            agreement = sqnr_db(expected["given"], given)
        if self.recipe.quant.of(component.name).narrowest >= 16:
            self._require(component.name, f"{what}, seen from AIMET,", agreement, floors.simulator_db)
        else:
            self._require(component.name, what, drift, floors.quantised_sqnr_db)
        return agreement

    def _require(self, name: str, what: str, value: float, floor: float) -> None:
        if not value >= floor:
            raise ParityError(
                f"{name}: {what} gives {value:.1f} dB SQNR, the floor is {floor:g} dB",
                next_step="calibrate with more pictures, or keep layers at 16 bit with quant.rules",
            )


def _plain(value: float) -> float | None:
    """Infinity, for identical outputs, is nothing that JSON can hold."""
    return None if value == math.inf else value


@torch.no_grad()
def largest_magnitudes(network: nn.Module, samples: Iterable[Tensors]) -> dict[str, float]:
    """Return by module path the largest magnitude of what each leaf module gave for any sample, in float32.

    `samples` are inputs in the order of the network's arguments, read one at a time.
    """
    peaks: dict[str, float] = {}

    def note(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            # A NaN stays: it is not below any limit.
            peaks[path] = float(np.maximum(peaks.get(path, 0.0), output.abs().max().item()))

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in network.named_modules()
        if not any(module.children())
    ]
    for sample in samples:
        network(*(torch.from_numpy(value) for value in sample.values()))
    for handle in handles:
        handle.remove()
    return peaks
