"""The script that measures the paper's network, on a small one: all the way to binaries for two chips."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.npu


BENCHMARKS = ROOT / "benchmarks"


def test_the_script_on_a_small_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script, common = importlib.import_module("full_size"), importlib.import_module("_common")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    arguments = ["--preset", BENCHMARKS / "small.toml", "--work", tmp_path / "work", "--result", "small"]
    monkeypatch.setattr(sys, "argv", ["full_size.py", *map(str, arguments), "--second-target", "SM8750"])
    script.main()
    result = json.loads((tmp_path / "results" / "small.json").read_bytes())
    components = ["image_encoder", "vae_encoder", "unet", "decoder"]
    assert list(result["components"]) == components
    for values in result["components"].values():
        (binary,) = values["binaries"]
        assert (binary["target"], binary["precision"]) == ("SM8650", "w8a16")
        assert binary["parts_bytes"][0] > 1000
    assert all(cost["peak_bytes"] > 1e8 for cost in result["stages"].values())
    assert result["drift"]["onnx"]["unet"] > 90
    assert result["drift"]["npu.SM8650"]["unet"] > 10
    anew = result["second_target"]["stages_made_anew"]
    assert anew == [f"{what} {name} SM8750" for name in components for what in ("compile", "simulate")]
    assert not (tmp_path / "work").exists()
