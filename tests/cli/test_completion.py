"""Shell completion: what a real bash gets from the script that typer installs, and that it is cheap."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mobilevd_deploy.cli.completion import complete_device, complete_target
from mobilevd_deploy.config.devices import find
from mobilevd_deploy.config.presets import preset_names
from mobilevd_deploy.config.recipe import recipe_names
from mobilevd_deploy.qnn.targets import targets
from tests.support import tiny_artifact

PROGRAM = """#!{python}
import atexit, sys
heavy = {{"torch", "numpy", "onnx", "onnxruntime", "diffusers", "transformers", "PIL", "qai_hub"}}
atexit.register(lambda: print(*sorted(heavy & set(sys.modules)), end="", file=sys.stderr))
from mobilevd_deploy.cli.main import main
main()
"""
# What bash does at the tab key, as far as a script can: the words, the index of the word, the function.
TAB = """
source <(_MOBILEVD_DEPLOY_COMPLETE=source_bash mobilevd-deploy)
[[ $(complete -p mobilevd-deploy) =~ -F\\ ([^ ]+) ]] || exit 1
COMP_WORDS=(mobilevd-deploy "$@")
COMP_CWORD=$#
${BASH_REMATCH[1]} mobilevd-deploy
printf '%s\\n' "${COMPREPLY[@]}"
"""


def complete(folder: Path, *words: str) -> list[str]:
    """Return what bash offers for the last of `words`, in `folder`."""
    assert shutil.which("bash"), "these tests need bash"
    program = folder / "bin" / "mobilevd-deploy"
    program.parent.mkdir(exist_ok=True)
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "--norc", "-c", TAB, "bash", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("export", "--recipe", ""), recipe_names()),
        (("export", "-r", "npu-f"), ["npu-float"]),
        (("init", "--preset", ""), preset_names()),
        (("doctor", "mobilevd-p"), ["mobilevd-pruned"]),
        (("export", "--target", "SM86"), ["SM8650"]),
        (("devices", "Xiaomi-14"), ["Xiaomi-14-Pro", "Xiaomi-14", "Xiaomi-14-Ultra"]),
        (("profile", "--device", "Xiaomi-14-P"), ["Xiaomi-14-Pro"]),
        (("profile", "estimate", "mobilevd", "-d", "OnePlus-13"), ["OnePlus-13"]),
        (("profile", "phone", "--back"), ["--backend"]),
        (("profile", "--compile-on", "hub-"), ["hub-aimet"]),
        (("profile", "--res"), ["--resume"]),
        (("insp",), ["inspect"]),
    ],
)
def test_bash_completes_names(tmp_path: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert complete(tmp_path, *words) == offered


def test_bash_completes_artifacts(tmp_path: Path) -> None:
    tiny_artifact.write_artifact(tmp_path / "build" / "clip-model")
    tiny_artifact.write_artifact(tmp_path / "mobile-model")
    (tmp_path / ".hidden").mkdir()
    shutil.copytree(tmp_path / "mobile-model", tmp_path / ".hidden" / "model")
    everything = ["build/clip-model", "mobile-model"]
    assert complete(tmp_path, "verify", "") == everything
    assert complete(tmp_path, "generate", "photo.jpg", "-a", "b") == ["build/clip-model"]
    assert complete(tmp_path, "inspect", "mobile-") == ["mobile-model"]
    ways = ["hub", "phone", "host", "estimate"]
    assert complete(tmp_path, "profile", "") == [*ways, *everything, *preset_names()]


def test_offered_devices_are_understood() -> None:
    words = [word for word, _ in complete_device()]
    assert "Xiaomi-14-Pro" in words
    for word in words:
        device = find(word)
        assert (device.phone or device.chip).name.replace(" ", "-") == word
    assert [word for word, _ in complete_target()] == [target.name for target in targets()]
