"""The app's plain Java part: its own tests, fed with artifacts and clips that Python made.

All are of the demo. MOBILEVD_NPU names an artifact that is there already, such as that of `make demo`; else
one is exported here in float16, for which no AIMET is needed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import mobilevd_deploy
from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.artifact.manifest import MANIFEST_DIGEST
from mobilevd_deploy.config.recipe import Recipe, load_recipe
from mobilevd_deploy.deploy import deploy
from mobilevd_deploy.profiling.phone.result import Benchmark
from tests.support import ROOT, clip_reference, golden

DEMO = ROOT / "models" / "demo.safetensors"
QNN = importlib.util.find_spec("onnxruntime_qnn")
SIMULATES = QNN is not None and (platform.system(), platform.machine()) == ("Linux", "x86_64")

# Where CI demands the app's tests, missing tools are a failure, not a skip.
pytestmark = [
    pytest.mark.android,
    pytest.mark.skipif(
        os.environ.get("MOBILEVD_ANDROID") != "required"
        and (shutil.which("javac") is None or shutil.which("mvn") is None),
        reason="needs JDK 17 and Maven",
    ),
]


@pytest.fixture(scope="module")
def report(demo_artifact, tmp_path_factory) -> tuple[str, str]:
    """The folder of everything, and what Java's tests printed."""
    folder = tmp_path_factory.mktemp("android")
    clip_reference.write(demo_artifact, "cpu", folder / "reference")
    settings = {"MOBILEVD_ARTIFACT": demo_artifact, "MOBILEVD_REFERENCE": folder / "reference"}
    if SIMULATES:
        npu = os.environ.get("MOBILEVD_NPU") or deploy(DEMO, _in_two_parts(), folder / "npu").root
        clip_reference.write(Path(npu), "npu-sim", folder / "npu-reference", pictures=1)
        settings |= {"MOBILEVD_NPU": npu, "MOBILEVD_NPU_REFERENCE": folder / "npu-reference"}
        settings |= {"MOBILEVD_QNN": Path(QNN.origin).parent}
    (folder / "results").mkdir()
    settings["MOBILEVD_RESULTS"] = folder / "results"
    ran = subprocess.run(
        [sys.executable, ROOT / "android_app" / "build.py", "test-core"],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:]
    return str(folder), ran.stdout


def _in_two_parts() -> Recipe:
    """The demo's UNet would fit into one binary; in two, Java runs parts in a row as well."""
    recipe = load_recipe("xiaomi-14-pro-float16")
    assert recipe.npu is not None
    return dataclasses.replace(recipe, npu=dataclasses.replace(recipe.npu, parts=2))


def test_javas_tests_pass(report):
    number = re.search(r"OK \((\d+) tests\)", report[1])
    assert number is not None
    assert int(number[1]) > 80


def test_javas_clips_are_pythons(report):
    """Java's tests skip what has no reference; so that it was there is seen here."""
    found = re.findall(r"(\S+): (\S+) dB against Python's clip", report[1])
    assert len(found) == (3 if SIMULATES else 2)
    assert all(float(decibels) >= 60 for _, decibels in found)


def test_python_reads_what_the_benchmark_wrote(report):
    schema = json.loads(
        (Path(mobilevd_deploy.__file__).parent / "profiling" / "phone" / "benchmark.schema.json").read_text()
    )
    results = {path.stem: path.read_bytes() for path in (Path(report[0]) / "results").iterdir()}
    assert {"run-1", "run-2", "run-3", "run-4"} <= results.keys()
    for text in results.values():
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    done, failed = Benchmark.from_json(results["run-1"]), Benchmark.from_json(results["run-3"])
    digest = (golden.VECTORS / "artifact" / MANIFEST_DIGEST).read_text().split()[0]
    assert done.artifact.manifest_sha256 == digest
    names = [c.name for c in Artifact.open(golden.VECTORS / "artifact").manifest.components]
    assert [timing.name for timing in done.components] == names
    assert done.state == "done"
    assert failed.error is not None
    assert (failed.error.component, failed.error.step) == ("decoder", "load")
