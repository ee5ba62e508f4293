"""Check what this computer is ready for by trying it, with a remedy for everything that is missing.

    quantise    AIMET imports
    compile     Qualcomm's compiler makes a small binary, and its simulator runs it
    memory, disk    compared with the needs of a model and a recipe
    hub         the client, its configuration, and whether the service answers
    phone       adb, an attached phone that allows debugging, the app on it
    apk         a JDK and Android's build tools

This computer is ready if it has everything that the recipe needs; the other checks are optional.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mobilevd_deploy.base.processes import memory_bytes
from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.recipe import NpuOptions, Recipe
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.deploy import bytes_per_parameter
from mobilevd_deploy.errors import MobileVDError
from mobilevd_deploy.profiling.hub import client

# Peak memory of the largest process of an export, in bytes: fixed part and bytes per parameter of the UNet.
# Measured: the demo's 5.7 M parameters took 1.8 GB (AIMET), in float 1.0 GB (onnxruntime); the paper's 845 M
# took 10.6 GB quantised (onnxruntime judging; AIMET needs nearly as much, the compiler's parts less) and 8.5
# GB in float (the trained network's outputs). _NPU is 2 % above the measurement, as runs differ by 0.1 GB.
# Sources: the demo's manifest, benchmarks/results/full_size.json.
_NPU = (1.7e9, 10.8)
_FLOAT = (1.0e9, 8.9)
_APK_TOOLS = ("javac", "mvn", "npm", "aapt2", "zipalign", "apksigner")
_JAVA = 17
_IMPORT_SECONDS = 300


@dataclass(frozen=True)
class DoctorFinding:
    """The result of one check. `needed`: the recipe requires it. `remedy`: None if it is ready."""

    what: str
    ready: bool
    needed: bool
    detail: str
    remedy: str | None = None


def examine(
    recipe: Recipe, spec: ModelSpec, folder: Path, progress: Progress | None = None
) -> list[DoctorFinding]:
    """Run all checks for exports of `spec` with `recipe` into `folder`.

    Takes about 30 s: imports AIMET, compiles and simulates a small graph, asks AI Hub for its devices.
    Changes nothing and raises nothing: every failure is a finding.
    """
    progress = progress or Progress()
    looks: tuple[tuple[str, Callable[[], DoctorFinding]], ...] = (
        ("AIMET", lambda: _aimet(recipe)),
        ("QNN compiler and simulator", lambda: _qnn(recipe)),
        ("memory", lambda: _memory(recipe, spec)),
        ("disk", lambda: _disk(recipe, spec, folder)),
        ("AI Hub", _hub),
        ("phone", _phone),
        ("APK tools", _apk),
    )
    findings = []
    for name, look in looks:
        progress.begin(name)
        findings.append(look())
        progress.end()
    return findings


def is_ready(findings: Iterable[DoctorFinding]) -> bool:
    """Return whether everything that the recipe needs is ready."""
    return all(finding.ready for finding in findings if finding.needed)


def _aimet(recipe: Recipe) -> DoctorFinding:
    needed, code = recipe.quant is not None, "import aimet_torch; print(aimet_torch.__version__)"
    try:
        # In a child process: the import takes 10 s, nothing else here needs it, and it may crash.
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        slow = f"the import took more than {_IMPORT_SECONDS} s"
        return DoctorFinding("AIMET", False, needed, slow, "close other programs, then check again")
    if done.returncode == 0:
        return DoctorFinding("AIMET", True, needed, f"version {done.stdout.split()[-1]}")
    reason = (done.stderr.strip().splitlines() or [f"the import ended with exit status {done.returncode}"])[
        -1
    ]
    return DoctorFinding("AIMET", False, needed, reason, _npu_remedy())


def _qnn(recipe: Recipe) -> DoctorFinding:
    what, needed = "QNN compiler and simulator", recipe.npu is not None
    options = recipe.npu or NpuOptions()
    try:
        import numpy as np
        import torch

        from mobilevd_deploy.base.tensors import Tensors, sqnr_db
        from mobilevd_deploy.config.recipe import OnnxOptions
        from mobilevd_deploy.npu.onnx_export import MODEL, export_onnx
        from mobilevd_deploy.qnn.compiler import compile_context
        from mobilevd_deploy.qnn.simulator import NpuSimRunner
        from mobilevd_deploy.qnn.targets import find_target

        torch.manual_seed(0)
        layer = torch.nn.Conv2d(32, 32, 3, padding=1).eval()
        inputs: Tensors = {"x": np.random.default_rng(0).standard_normal((1, 32, 8, 16), np.float32)}
        with tempfile.TemporaryDirectory() as scratch:
            export_onnx(layer, inputs, ["y"], Path(scratch), OnnxOptions())
            target = find_target(options.targets[0])
            made = compile_context(
                Path(scratch) / MODEL, Path(scratch) / "npu", target, options, float16=True
            )
            given = NpuSimRunner(made.wrapper).run(inputs)["y"]
        with torch.no_grad():
            agreement = sqnr_db(layer(torch.from_numpy(inputs["x"])).numpy(), given)
    except (MobileVDError, ImportError, OSError) as error:
        said = error.what if isinstance(error, MobileVDError) else str(error)
        remedy = (error.next_step if isinstance(error, MobileVDError) else None) or _npu_remedy()
        return DoctorFinding(what, False, needed, said.splitlines()[0], remedy)
    if agreement < 40:
        return DoctorFinding(
            what,
            False,
            needed,
            f"the simulator's output is wrong: {agreement:.0f} dB SQNR against torch",
            _npu_remedy(),
        )
    detail = f"QAIRT {made.sdk} compiled and simulated a layer for {made.soc}, {agreement:.0f} dB SQNR"
    return DoctorFinding(what, True, needed, detail)


def _npu_remedy() -> str:
    if (here := f"{platform.system()} {platform.machine()}") != "Linux x86_64":
        return f"Qualcomm's tools are for Linux on x86-64, this is {here}; --recipe onnx needs none of them"
    return "pip install 'mobilevd-deploy[npu]'"


def _memory(recipe: Recipe, spec: ModelSpec) -> DoctorFinding:
    fixed, each = _NPU if recipe.quant or recipe.npu else _FLOAT
    needed, there, free = fixed + each * parameters(spec, recipe), *memory_bytes()
    detail = (
        f"{spec.name} with {recipe.name} takes about {needed / 1e9:.1f} GB; this computer has "
        f"{there / 1e9:.1f} GB, {free / 1e9:.1f} GB of them free"
    )
    if there >= needed and free >= needed:
        return DoctorFinding("memory", True, True, detail)
    remedy = "close other programs" if there >= needed else "use a computer with more, or add swap"
    return DoctorFinding("memory", False, True, detail, remedy)


def _disk(recipe: Recipe, spec: ModelSpec, folder: Path) -> DoctorFinding:
    stages = bytes_per_parameter(recipe)
    chips = len(recipe.npu.targets) if recipe.npu else 0
    written = stages["export"] + stages["quantise"] + chips * stages["compile"]
    needed = written * parameters(spec, recipe) + 0.2e9
    free = shutil.disk_usage(folder).free
    detail = (
        f"{spec.name} takes about {needed / 1e9:.1f} GB while it is exported, {free / 1e9:.1f} GB are free"
    )
    if free >= needed:
        return DoctorFinding("disk", True, True, detail)
    return DoctorFinding("disk", False, True, detail, "free some space, or work on another disk")


def _hub() -> DoctorFinding:
    try:
        opened = client.Hub.open()
        count = len(opened.devices())
    except MobileVDError as error:
        return DoctorFinding("AI Hub", False, False, error.what, error.next_step)
    if opened.exposed:
        return DoctorFinding("AI Hub", False, False, *opened.exposed)
    return DoctorFinding("AI Hub", True, False, f"{opened.url} lists {count} devices")


def _phone() -> DoctorFinding:
    from mobilevd_deploy.profiling.phone.adb import Adb
    from mobilevd_deploy.profiling.phone.run import require_app

    try:
        phone = Adb.open()
        require_app(phone)
    except MobileVDError as error:
        return DoctorFinding("phone", False, False, error.what, error.next_step)
    return DoctorFinding("phone", True, False, f"{phone.serial} is attached, and has the app")


def _apk() -> DoctorFinding:
    missing = [name for name in _APK_TOOLS if shutil.which(name) is None]
    remedy = "apt install openjdk-17-jdk-headless maven npm aapt zipalign apksigner"
    if missing:
        return DoctorFinding("APK tools", False, False, f"missing: {', '.join(missing)}", remedy)
    done = subprocess.run(["javac", "-version"], capture_output=True, text=True, check=False)
    found = re.search(r"javac (\d+)", done.stdout + done.stderr)
    version = int(found[1]) if found else 0
    if version < _JAVA:
        return DoctorFinding("APK tools", False, False, f"JDK {version} is older than {_JAVA}", remedy)
    return DoctorFinding("APK tools", True, False, f"JDK {version}, Maven, npm and Android's build tools")


def parameters(spec: ModelSpec, recipe: Recipe) -> int:
    """Count the parameters of a model's UNet, the largest component, after the recipe's rewrites."""
    from mobilevd_deploy.npu.skeleton import rewrites, rewritten_skeleton

    step, _ = rewritten_skeleton(spec, rewrites(recipe))
    return sum(parameter.numel() for parameter in step.unet.parameters())
