"""The public names of the package."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mobilevd_deploy


def python(code: str) -> str:
    """Run Python code in a process of its own and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_public_names_are_these_and_sorted() -> None:
    assert mobilevd_deploy.__all__ == ["Artifact", "deploy", "generate", "load_recipe", "open_checkpoint"]
    assert set(mobilevd_deploy.__all__) <= set(dir(mobilevd_deploy))
    for name in mobilevd_deploy.__all__:
        assert inspect.getdoc(getattr(mobilevd_deploy, name))


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "diffusers", "transformers", "PIL", "typer"}
    assert python(f"import sys, mobilevd_deploy; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize(
    "imports",
    [
        "",
        "import mobilevd_deploy.deploy, mobilevd_deploy.generate",
        "from mobilevd_deploy.deploy import stage_table",
        "from mobilevd_deploy import deploy, generate",
        "from mobilevd_deploy import *",
    ],
)
def test_a_public_name_is_the_function_whatever_was_imported_before(imports: str) -> None:
    code = f"""
{imports}
import mobilevd_deploy as mvd
print(*(type(getattr(mvd, name)).__name__ for name in mvd.__all__))
import mobilevd_deploy.deploy
print(type(mvd.deploy).__name__, type(mvd.generate).__name__)
"""
    assert python(code) == "type function function function function\nfunction function"


def test_submodules_are_imported_as_ever() -> None:
    assert importlib.import_module("mobilevd_deploy.deploy").stage_table
    assert mobilevd_deploy.errors.__name__ == "mobilevd_deploy.errors"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'depoly'"):
        mobilevd_deploy.depoly  # noqa: B018


def test_types_are_shipped_and_are_the_real_ones() -> None:
    """mypy reads py.typed, and imports for type checkers that name the same modules as at run time."""
    package = Path(mobilevd_deploy.__file__)
    assert package.with_name("py.typed").is_file()
    (block,) = (node for node in ast.parse(package.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == mobilevd_deploy._MODULES
