"""The worked examples of CONTRIBUTING.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def examples(heading: str) -> list[str]:
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


def run(code: str, scope: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "CONTRIBUTING.md", "exec"), scope)
    return scope


def test_the_pass_passes_its_own_tests() -> None:
    code, tests = examples("Add a pass")
    scope = run(tests, run(code, {"__name__": "example"}))
    found = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(found) == 2
    for test in found:
        test()


def test_the_pass_fails_the_runner_if_it_breaks_a_weight() -> None:
    from mobilevd_deploy.errors import RewriteError
    from mobilevd_deploy.passes.runner import UNetProbe, run_passes
    from tests.support.networks import FULL, build_unet

    code, _ = examples("Add a pass")
    right = run(code, {"__name__": "example"})["DropDropout"]

    class Broken(right):  # type: ignore[misc, valid-type]
        def apply(self, unet: Any) -> tuple[str, ...]:
            unet.conv_out.weight.mul_(1.01)
            return tuple(super().apply(unet))

    unet = build_unet(FULL)
    with pytest.raises(RewriteError, match="drop-dropout changed the outputs"):
        run_passes(unet, [Broken()], UNetProbe.make(unet, 4, 4), 90)


def test_the_checkpoint_form_passes_its_own_test(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import json

    import torch
    from safetensors.torch import load_file, save_file

    from mobilevd_deploy.model.checkpoint import Checkpoint, open_checkpoint
    from mobilevd_deploy.model.interface import COMPONENTS

    code, tests = examples("Add a checkpoint form")
    scope = run(code, {"__name__": "example"})
    scope |= {
        "COMPONENTS": COMPONENTS,
        "Checkpoint": Checkpoint,
        "json": json,
        "load_file": load_file,
        "open_checkpoint": open_checkpoint,
        "save_file": save_file,
        "torch": torch,
    }
    (test,) = [value for name, value in run(tests, scope).items() if name.startswith("test_")]
    test(tiny_checkpoint, tmp_path)
