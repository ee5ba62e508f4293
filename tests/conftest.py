"""Fixtures that many folders use."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch

from mobilevd_deploy.artifact.artifact import Artifact
from mobilevd_deploy.config.recipe import load_recipe, recipe_names
from tests.support import ROOT
from tests.support.networks import write_checkpoint

# These networks are so small that threads cost more than they give, the more so on a busy machine.
torch.set_num_threads(1)

# A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

_NPU_TOOLS = {"aimet_torch": "aimet-torch", "onnxruntime_qnn": "onnxruntime-qnn"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of exported artifacts as slow. Put the longest files first, so that workers end together."""
    for item in items:
        if {"exported", "demo_artifact"} & {*getattr(item, "fixturenames", ())}:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not (item.get_closest_marker("android") or item.get_closest_marker("npu")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test with the marker `npu` where the vendor's tools are missing, and name them."""
    missing = [name for module, name in _NPU_TOOLS.items() if importlib.util.find_spec(module) is None]
    if missing and item.get_closest_marker("npu"):
        pytest.skip(f"needs {' and '.join(missing)} (Linux x86-64: pip install 'mobilevd-deploy[npu]')")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of TINY_MODEL; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's float artifact: the one that MOBILEVD_ARTIFACT names, as in `make test`, or a new one."""
    from mobilevd_deploy.deploy import deploy

    if named := os.environ.get("MOBILEVD_ARTIFACT"):
        return Path(named)
    demo = ROOT / "models" / "demo.safetensors"
    return deploy(demo, load_recipe("onnx"), tmp_path_factory.mktemp("demo") / "artifact").root


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """TINY_MODEL exported by each shipped float recipe, which costs seconds; not to be changed."""
    from mobilevd_deploy.deploy import deploy

    folder = tmp_path_factory.mktemp("exported")
    recipes = [recipe for recipe in map(load_recipe, recipe_names()) if not (recipe.quant or recipe.npu)]
    return {recipe.name: deploy(tiny_checkpoint, recipe, folder / recipe.name) for recipe in recipes}
