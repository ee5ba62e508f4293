"""Cost and benefit of the rewrites and the deploy form: writes results/export_cost.json.

    python benchmarks/export_cost.py [--only demo]    the demo and midsize.toml
    python benchmarks/export_cost.py --quick          a tiny network, as a smoke test; writes nothing

The UNet of each model is exported to ONNX in two ways, alternately, each in a new process:

    ours           rewrites, each proven; deploy form; export; file read back; parity on onnxruntime
    alternative    the unchanged network by torch.onnx.export(dynamo=True) with its default options

Then one process loads both files and runs them alternately. Ratios are ours divided by the alternative's, so
values below 1 favour ours. Networks are in float32. The demo has its trained weights if the file exists;
other models have random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from _common import write_result
from rich.console import Console
from rich.table import Table

from mobilevd_deploy.base.progress import Progress, make_progress
from mobilevd_deploy.config.data import data_dir
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.config.spec import ModelSpec, UNetSpec
from mobilevd_deploy.config.strict import from_dict

if TYPE_CHECKING:  # this process stays small: Linux lets a child inherit its parent's peak memory
    from mobilevd_deploy.base.tensors import Tensors
    from mobilevd_deploy.model.unet import MobileVDUNet

WEIGHTS_SEED = 1
INPUTS_SEED = 2
RECIPE = "onnx"
WARM_UP = 2
PAIRS = 12
EXPORT_PARTS = ("deploy form", "export")  # what the alternative's only part, "export", is compared with

Record = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model to measure; its weights are random if it has no checkpoint."""

    spec: ModelSpec
    repetitions: int
    pairs: int = PAIRS
    checkpoint: Path | None = None

    @property
    def rough_seconds(self) -> float:
        """Estimate the seconds of an export; only the proportions matter."""
        return 20 + sum(channels**2 for channels in self.spec.unet.block_out_channels) / 5000


def subjects() -> tuple[Subject, ...]:
    """Return the models of the published result: the demo and the medium one."""
    trained = data_dir("models") / "demo.safetensors"
    demo = Subject(load_preset("demo").model, 2, checkpoint=trained if trained.exists() else None)
    return demo, Subject(load_preset(Path(__file__).with_name("midsize.toml")).model, 1)


def quick_subject() -> Subject:
    """Return a network of one level on latents of 4x4 that every rewrite changes."""
    demo = load_preset("demo").model
    unet = UNetSpec(
        block_out_channels=(64,),
        num_attention_heads=(2,),
        attention=(False,),
        layers_per_block=1,
        cross_attention_dim=demo.unet.cross_attention_dim,
        addition_time_embed_dim=16,
        gated=True,
        kept_temporal_blocks=("mid_block.attentions.0", "up_blocks.0.resnets.1"),
        funnels=demo.unet.funnels,
    )
    spec = dataclasses.replace(demo, name="quick", frames=2, height=32, width=32, unet=unet)
    return Subject(spec, repetitions=1, pairs=3)


def measure(subject: Subject, progress: Progress) -> Record:
    """Export `subject` both ways, run both files, and return figures and ratios.

    Raises RuntimeError if our own side fails; a failure of the alternative is recorded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            "spec": subject.spec.to_dict(),
            "checkpoint": subject.checkpoint and str(subject.checkpoint),
            "pairs": subject.pairs,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        runs: dict[str, list[Record]] = {"ours": [], "alternative": []}
        for number in range(subject.repetitions):
            # The order alternates, so that neither side always runs after the other.
            for side in tuple(runs)[:: -1 if number % 2 else 1]:
                with _stage(progress, f"{subject.spec.name}: {side} {number + 1}"):
                    runs[side].append(_in_child(side, folder))
        with _stage(progress, f"{subject.spec.name}: onnxruntime"):
            latency = _in_child("latency", folder)
    return summarise(subject.spec.name, runs["ours"], runs["alternative"], latency)


def summarise(
    name: str, ours: Sequence[Record], alternative: Sequence[Record], latency: Record
) -> dict[str, Any]:
    """Put the children's records together: medians over the runs, and ratios of ours to the alternative's.

    Without a result of the alternative there are no ratios. Raises RuntimeError if a run of ours failed.
    """
    for record in (*ours, latency):
        if record["error"]:
            raise RuntimeError(f"{name}: {record['error']}")
    identity = {
        key: ours[0][key] for key in ("parameters", "temporal_blocks", "frames", "latents", "weights")
    }
    sides = {"ours": _side(ours), "alternative": _side(alternative)}
    for side, graph in latency["graphs"].items():
        sides[side] |= graph | {"latency_ms": median(latency["milliseconds"][side])}
    sides["ours"]["parity_db"] = ours[0]["parity_db"]
    sides["ours"]["passes"] = ours[0]["passes"]
    summary: dict[str, Any] = {"name": name, **identity, **sides}
    if "alternative" not in latency["graphs"]:
        return summary | {"ratios": {}}
    us, them = sides["ours"], sides["alternative"]
    exporting = sum(us["seconds"][part] for part in EXPORT_PARTS)
    ratios = {
        "export_seconds": exporting / them["total_seconds"],
        "total_seconds": us["total_seconds"] / them["total_seconds"],
        **{key: us[key] / them[key] for key in ("peak_bytes", "bytes", "nodes", "flops", "latency_ms")},
    }
    return summary | {
        "ratios": ratios,
        "agreement_db": latency["agreement_db"],
        "pairs": latency["milliseconds"],
    }


def _side(runs: Sequence[Record]) -> dict[str, Any]:
    if error := next((run["error"] for run in runs if run["error"]), None):
        return {"error": error, "runs": list(runs)}
    return {
        "seconds": {part: median(run["seconds"][part] for run in runs) for part in runs[0]["seconds"]},
        "total_seconds": median(sum(run["seconds"].values()) for run in runs),
        "peak_bytes": median(run["peak_bytes"] for run in runs),
        "peak_bytes_before": median(run["peak_bytes_before"] for run in runs),
        "runs": [{key: run[key] for key in ("seconds", "peak_bytes")} for run in runs],
    }


@contextmanager
def _stage(progress: Progress, name: str) -> Iterator[None]:
    progress.begin(name)
    yield
    progress.end()


def _in_child(kind: str, folder: Path) -> Record:
    """Run one measurement in its own process; "error" says how it failed."""
    record = folder / f"{kind}.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not record.exists():
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"error": f"{kind}: the process ended with {done.returncode}: {last}"}
    values: Record = json.loads(record.read_text(encoding="utf-8"))
    return {"error": None} | values


class _Meter:
    """Seconds of each part of a run, and the process's peak of resident memory since its start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.before = _peak_bytes()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun

    def record(self) -> Record:
        return {"seconds": self.seconds, "peak_bytes_before": self.before, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# The rest runs in the children.


def _load(job: Mapping[str, Any]) -> tuple[MobileVDUNet, ModelSpec, Record]:
    """Return the network in training form, its spec, and what identifies both."""
    # Import what both sides need later, so that no import is timed.
    import onnxruntime  # noqa: F401
    import onnxsim  # noqa: F401
    import torch

    import mobilevd_deploy.deploy  # noqa: F401
    from mobilevd_deploy.model.checkpoint import open_checkpoint
    from mobilevd_deploy.model.components import build_component
    from mobilevd_deploy.model.funnels import initialise_he
    from mobilevd_deploy.model.unet import GatedBlender, MobileVDUNet

    weights: Record
    if job["checkpoint"]:
        checkpoint = open_checkpoint(job["checkpoint"])
        spec, network = checkpoint.spec, checkpoint.load("unet")
        weights = {"file": checkpoint.path.name, "sha256": checkpoint.sha256}
    else:
        spec = from_dict(ModelSpec, job["spec"])
        torch.manual_seed(WEIGHTS_SEED)
        network = build_component(spec, "unet")
        initialise_he(network)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim < 2:  # initial norms, biases and blends are 1, 0 and equal
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        weights = {"random": "torch's initialisation, vectors and scalars moved by 0.1", "seed": WEIGHTS_SEED}
    assert isinstance(network, MobileVDUNet)
    blocks = network.temporal_blocks().values()
    kept = sum(not isinstance(b.time_mixer, GatedBlender) or float(b.time_mixer.gate) == 1 for b in blocks)
    height, width = spec.latent_size
    identity = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "temporal_blocks": {"total": len(blocks), "kept": kept},
        "frames": spec.frames,
        "latents": f"{width}x{height}",
        "weights": weights,
    }
    return network, spec, identity


def _ours(job: Mapping[str, Any], folder: Path) -> Record:
    """Export the UNet as deploy() does, but prove the rewrites on latents of full size."""
    import torch

    from mobilevd_deploy.model.components import deploy_contract
    from mobilevd_deploy.model.interface import component_tensors
    from mobilevd_deploy.npu.build import build_npu
    from mobilevd_deploy.npu.onnx_export import MODEL, export_onnx, read_graph
    from mobilevd_deploy.passes.runner import UNetProbe, run_passes, select_passes
    from mobilevd_deploy.runtime.runners import OnnxRunner
    from mobilevd_deploy.stages.probe import Probe

    network, spec, identity = _load(job)
    recipe = load_recipe(RECIPE)
    _, (output,) = component_tensors("unet", spec)
    meter = _Meter()

    with meter.part("reference"), torch.no_grad():
        feeds = _feeds(spec)
        denoised = deploy_contract(network)(*(torch.from_numpy(value) for value in feeds.values()))
        probe = Probe(feeds, {output.name: denoised.numpy()})
    with meter.part("rewrites with proofs"):
        passes = select_passes(recipe.passes)
        reports = run_passes(
            network, passes, UNetProbe.make(network, *spec.latent_size), recipe.floors.rewrite_sqnr_db
        )
    with meter.part("deploy form"):
        deployed = build_npu("unet", network, spec, recipe.graph)
    del network
    with meter.part("export"):
        export_onnx(deployed, probe.inputs, [output.name], folder / "ours", recipe.onnx)
    del deployed
    with meter.part("read back"):
        read_graph(folder / "ours" / MODEL)
    with meter.part("parity"):
        drift = probe.drift(OnnxRunner(folder / "ours" / MODEL).run(probe.inputs))
    passed = {report.name: {"changed": len(report.changed), "drift_db": report.sqnr_db} for report in reports}
    return meter.record() | identity | {"parity_db": drift, "passes": passed}


def _alternative(job: Mapping[str, Any], folder: Path) -> Record:
    """Export the trained network with torch's exporter."""
    import torch

    from mobilevd_deploy.model.components import deploy_contract
    from mobilevd_deploy.npu.onnx_export import MODEL

    network, spec, _ = _load(job)
    feeds = _feeds(spec)
    path = folder / "alternative" / MODEL
    path.parent.mkdir(exist_ok=True)
    meter = _Meter()
    error = None
    try:
        with meter.part("export"):
            torch.onnx.export(
                deploy_contract(network),
                tuple(torch.from_numpy(value) for value in feeds.values()),
                path,
                input_names=list(feeds),
                dynamo=True,
                external_data=True,
            )
    except Exception as raised:  # it raises any exception, and a failure is a result
        path.unlink(missing_ok=True)
        error = f"{type(raised).__name__}: {(str(raised).strip() or 'no message').splitlines()[0][:300]}"
    return meter.record() | {"error": error}


def _latency(job: Mapping[str, Any], folder: Path) -> Record:
    """Run the existing files alternately, on the inputs of their export."""
    import onnx
    import torch

    from mobilevd_deploy.base.tensors import sqnr_db
    from mobilevd_deploy.model.checkpoint import open_checkpoint
    from mobilevd_deploy.model.components import build_component, deploy_contract
    from mobilevd_deploy.model.flops import count_flops
    from mobilevd_deploy.model.interface import input_shapes
    from mobilevd_deploy.npu.onnx_export import MODEL, read_graph
    from mobilevd_deploy.runtime.runners import OnnxRunner

    spec = open_checkpoint(job["checkpoint"]).spec if job["checkpoint"] else from_dict(ModelSpec, job["spec"])
    with torch.device("meta"):
        untouched = deploy_contract(build_component(spec, "unet"))
        shapes = input_shapes(spec, "unet").values()
        # The alternative's file has tensors of rank 5, which the graph's reader refuses: count the network.
        flops = {"alternative": count_flops(untouched, *(torch.empty(shape) for shape in shapes))}
    paths = {
        side: folder / side / MODEL for side in ("ours", "alternative") if (folder / side / MODEL).exists()
    }
    flops["ours"] = read_graph(paths["ours"]).flops
    graphs = {
        side: {
            "nodes": len(onnx.load(path, load_external_data=False).graph.node),
            "bytes": sum(file.stat().st_size for file in path.parent.iterdir()),
            "flops": flops[side],
        }
        for side, path in paths.items()
    }
    feeds = _feeds(spec)
    runners = {side: OnnxRunner(path) for side, path in paths.items()}
    outputs = {side: next(iter(runner.run(feeds).values())) for side, runner in runners.items()}
    milliseconds: dict[str, list[float]] = {side: [] for side in runners}
    for number in range(WARM_UP + job["pairs"]):
        for side in tuple(runners)[:: -1 if number % 2 else 1]:
            begun = time.perf_counter()
            runners[side].run(feeds)
            milliseconds[side].append(1000 * (time.perf_counter() - begun))
    agreement = sqnr_db(outputs["alternative"], outputs["ours"]) if "alternative" in outputs else None
    return {
        "graphs": graphs,
        "milliseconds": {side: values[WARM_UP:] for side, values in milliseconds.items()},
        "agreement_db": agreement,
    }


def _feeds(spec: ModelSpec) -> Tensors:
    from mobilevd_deploy.model.interface import component_tensors
    from mobilevd_deploy.stages.probe import make_probe

    return make_probe(component_tensors("unet", spec)[0], INPUTS_SEED, lambda _: {}).inputs


_CHILDREN: dict[str, Callable[[Mapping[str, Any], Path], Record]] = {
    "ours": _ours,
    "alternative": _alternative,
    "latency": _latency,
}

# Heading with unit, key of a side, divisor, decimals.
_ROWS = (
    ("all of it [s]", "total_seconds", 1.0, 1),
    ("peak memory [MB]", "peak_bytes", 1e6, 0),
    ("files [MB]", "bytes", 1e6, 1),
    ("nodes", "nodes", 1.0, 0),
    ("work of a run [GFLOP]", "flops", 1e9, 3),
    ("onnxruntime [ms]", "latency_ms", 1.0, 1),
)


def table(result: Mapping[str, Any]) -> Table:
    """Return one model's result as a table."""
    blocks = result["temporal_blocks"]
    agreement = f", the files agree to {result['agreement_db']:.0f} dB" if result["ratios"] else ""
    shown = Table(
        title=f"{result['name']}: {result['parameters'] / 1e6:.1f} M parameters, {blocks['kept']} of "
        f"{blocks['total']} temporal blocks kept{agreement}"
    )
    for heading in ("", "ours", "alternative", "ratio"):
        shown.add_column(heading, justify="right" if heading else "left")
    ours, alternative, ratios = result["ours"], result["alternative"], result["ratios"]
    for part, seconds in ours["seconds"].items():
        others = alternative.get("seconds", {}).get(part)
        shown.add_row(f"  {part} [s]", f"{seconds:.1f}", f"{others:.1f}" if others is not None else "", "")
    if ratios:
        shown.add_row("  " + " + ".join(EXPORT_PARTS), "", "", f"{ratios['export_seconds']:.2f}")
    for heading, key, divisor, decimals in _ROWS:
        values = (
            f"{side[key] / divisor:,.{decimals}f}" if key in side else "-" for side in (ours, alternative)
        )
        shown.add_row(heading, *values, f"{ratios[key]:.2f}" if ratios else "-")
    if "error" in alternative:
        shown.caption = f"The alternative failed: {alternative['error']}"
    return shown


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="only a tiny network; writes nothing")
    which.add_argument("--only", choices=("demo", "midsize"), help="leave the other model out")
    parser.add_argument("--child", choices=_CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads((arguments.folder / "job.json").read_text(encoding="utf-8"))
        record = _CHILDREN[arguments.child](job, arguments.folder)
        (arguments.folder / f"{arguments.child}.json").write_text(json.dumps(record), encoding="utf-8")
        return

    chosen = (quick_subject(),) if arguments.quick else subjects()
    chosen = tuple(subject for subject in chosen if arguments.only in (None, subject.spec.name))
    plan = {
        f"{subject.spec.name}: {stage}": subject.rough_seconds
        for subject in chosen
        for stage in (
            *(f"{side} {n + 1}" for n in range(subject.repetitions) for side in ("ours", "alternative")),
            "onnxruntime",
        )
    }
    results: list[Record] = []
    with make_progress() as progress:
        progress.plan(plan)
        for subject in chosen:
            results.append(measure(subject, progress))
            if not arguments.quick:  # after each model, so that a later failure loses nothing
                write_result("export_cost", _values(results, arguments.only))
    for result in results:
        Console().print(table(result))


def _values(results: Sequence[Record], only: str | None) -> Record:
    return {
        "command": "python benchmarks/export_cost.py" + (f" --only {only}" if only else ""),
        "recipe": RECIPE,
        "seeds": {"weights": WEIGHTS_SEED, "inputs": INPUTS_SEED},
        "ratios": "ours over the alternative's; seconds and memory: medians over the runs, "
        f"latency: of the medians of {PAIRS} alternating pairs",
        "models": results,
    }


if __name__ == "__main__":
    main()
