"""The files that GitHub reads: their schemas, and that the workflow calls what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCHEMAS = {
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".github/ISSUE_TEMPLATE/bug.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/idea.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
}


def validate(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", SCHEMAS)
def test_files_fit_githubs_schemas(name: str) -> None:
    done = validate(ROOT / name, SCHEMAS[name])
    assert done.returncode == 0, done.stdout


def test_a_misspelt_key_is_noticed(tmp_path: Path) -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    broken = tmp_path / "ci.yml"
    broken.write_text(text.replace("timeout-minutes", "timeout-minute"))
    assert validate(broken, SCHEMAS[".github/workflows/ci.yml"]).returncode != 0


def test_every_yaml_file_has_a_schema() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.y*ml")}
    assert found == set(SCHEMAS)


def test_the_workflow_calls_what_exists() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake (\S+)", text))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"docs", "apk"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
