"""The manual: what it names exists, what it shows runs, and what is generated is complete."""

from __future__ import annotations

import io
import json
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from docs import generate
from tests.support import ROOT

DOCS = ROOT / "docs"

PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "models").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / ".github").glob("*.md"),
        *DOCS.rglob("*.md"),
    )
    if "_generated" not in path.parts
)
PROGRAM = "mobilevd-deploy"
# Paths that a page names as an example of what a reader would create.
EXAMPLES = {
    "mobilevd_deploy/passes/drop_dropout.py",
    "mobilevd_deploy/model/parts_folder.py",
    "export/galaxy-s25.toml",
}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands_of(path: Path) -> Iterator[list[str]]:
    """Yield the arguments of every command of ours that a page shows."""
    text = path.read_text(encoding="utf-8")
    lines = [
        line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()
    ]
    spans = re.findall(rf"`({PROGRAM} [^`\n]+)`", text)
    for line in (*lines, *spans):
        words = shlex.split(line.removeprefix("$ ").strip(), comments=True) if PROGRAM in line else []
        if words and Path(words[0]).name == PROGRAM and "..." not in words:
            yield words[1:]


def parse(arguments: list[str]) -> None:
    """Parse a command line as the program would, without running it."""
    command: Any = typer.main.get_command(generate.load(generate.CLI))
    context = command.make_context(PROGRAM, list(arguments), resilient_parsing=False)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    folders = "mobilevd_deploy|benchmarks|models|export|tests|docs|android_app|\\.github|\\.ci"
    found = re.findall(
        rf"(?<![\w./<-])((?:{folders})/[\w./*{{}}-]*\w[\w./*{{}}-]*)", page.read_text(encoding="utf-8")
    )
    missing = {path.rstrip(".") for path in found if not list(ROOT.glob(path.rstrip("./")))}
    assert missing <= EXAMPLES


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    """For what GitHub shows; the strict build of the manual checks its own pages and their anchors too."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)|src=\"([^\"]+)\"", text):
        link = "".join(target)
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands_of(page)]], ids=names)
def test_commands_that_a_page_shows_are_understood(page: Path) -> None:
    for arguments in commands_of(page):
        try:
            parse(arguments)
        except (typer.Exit, SystemExit):
            pass
        except Exception as error:  # typer's own classes, whatever they are called
            pytest.fail(f"{PROGRAM} {shlex.join(arguments)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_make_targets_that_a_page_names_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`|\$ )make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.M)
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.M)} == set()


def test_a_wrong_option_is_noticed() -> None:
    with pytest.raises(Exception, match="--adbb"):
        parse(["profile", "my-model", "--adbb"])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")], ids=names)
def test_recipes_and_devices_that_a_page_shows_are_read(page: Path) -> None:
    import tomllib

    from mobilevd_deploy.config.devices import table
    from mobilevd_deploy.config.recipe import Recipe
    from mobilevd_deploy.config.strict import from_dict

    known = {sm.upper() for chip in table().chip for sm in chip.sm}
    for text in blocks(page, "toml"):
        values = tomllib.loads(text)
        if "chip" in values:
            shown = from_dict(type(table()), {"published_by": "", **values})
            assert {phone.chip for phone in shown.phone} <= {chip.name for chip in shown.chip}
        else:
            recipe = from_dict(Recipe, {"name": "shown", **values})
            assert recipe.npu is None or set(recipe.npu.targets) <= known


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")], ids=names)
def test_json_that_a_page_shows_is_a_model_configuration(page: Path) -> None:
    from mobilevd_deploy.config.spec import ModelSpec
    from mobilevd_deploy.config.strict import from_dict

    for text in blocks(page, "json"):
        from_dict(ModelSpec, json.loads(text))


def test_every_place_that_raises_is_in_the_error_index() -> None:
    """Counted by tokens, where the index walks syntax trees."""
    classes, counted = set(generate.error_classes()), 0
    sources = [path.read_text(encoding="utf-8") for path in generate.PACKAGE.rglob("*.py")]
    for text in sources:
        classes |= {own for own, base in re.findall(r"^class (\w+)\((\w+)\):", text, re.M) if base in classes}
    for text in sources:
        words = [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        trios = zip(["", *words], words, words[1:], strict=False)
        counted += sum(
            word in classes and after == "(" and before != "class" for before, word, after in trios
        )
    assert counted > 300
    assert len(generate.raised_errors()) == counted


def test_every_error_class_has_advice() -> None:
    text = (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### (\w+)$", text, re.M)) == set(generate.error_classes())


def test_the_frequent_cases_quote_messages_that_exist() -> None:
    text = (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8")
    table = text.split("## Frequent cases")[1].split("## By class")[0]
    messages = [one.message or "" for one in generate.raised_errors()]
    symptoms = re.findall(r"^\| ([^|]+) \|", table, re.M)
    quoted = [span for symptom in symptoms for span in re.findall(r"`([^`]+ [^`]+)`", symptom)]
    assert len(quoted) >= 4
    for span in quoted:
        parts = [part for part in span.split("...") if part.strip()]
        assert any(all(part in message for part in parts) for message in messages), span


def test_every_recipe_key_is_in_the_reference() -> None:
    from mobilevd_deploy.config.recipe import load_recipe

    text = generate.keys(generate.RECIPE, "`[{}]`".format)
    for section, values in load_recipe("xiaomi-14-pro").to_dict().items():
        assert f"`{section}`" in text
        for key in values if isinstance(values, dict) else ():
            assert f"| `{key}` |" in text.split(f"### `[{section}]`")[1]


def test_no_page_names_a_path_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(root|work|home)/", page.read_text(encoding="utf-8")), page
