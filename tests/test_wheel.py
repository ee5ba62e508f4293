"""A release's wheel: built, installed in an empty environment, and used outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.support import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path file of that folder, such as that of the editable checkout, has no effect from here.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(program: Path, *arguments: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [program, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "mobilevd_deploy", "models", "export"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    data = ("models/", "export/")
    expected = {f"mobilevd_deploy/_data/{name}" if name.startswith(data) else name for name in tracked}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_demo_is_exported_and_makes_a_clip(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import mobilevd_deploy as m; print(m.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    shutil.copy(ROOT / "models" / "demo.png", tmp_path / "photo.png")
    program = installed / "mobilevd-deploy"
    run(program, "export", "--recipe", "onnx", "--output", "artifact", "--quiet", cwd=tmp_path)
    run(program, "generate", "photo.png", "--artifact", "artifact", "--output", "clip.gif", cwd=tmp_path)
    with Image.open(tmp_path / "clip.gif") as clip:
        assert (clip.size, clip.n_frames) == ((128, 64), 14)  # type: ignore[attr-defined]
