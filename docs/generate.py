"""The generated part of the reference, as Markdown: command line, keys, error index and Python API.

    python docs/generate.py FOLDER

`conf.py` calls `write_all` before every build. The pages of `docs/reference/` include the files written here.
Nothing here imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe

import mobilevd_deploy

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mobilevd_deploy"

# Where the documented objects are defined. This is the only place to change when one of them moves.
CLI = "mobilevd_deploy.cli.main:app"
RECIPE = "mobilevd_deploy.config.recipe:Recipe"
MODEL_SPEC = "mobilevd_deploy.config.spec:ModelSpec"
PRESETS = "mobilevd_deploy.config.presets"
MANIFEST = "mobilevd_deploy.artifact.manifest:Manifest"
PROFILE = "mobilevd_deploy.profiling.profile:Profile"
TRAFFIC = "mobilevd_deploy.profiling.profile:TrafficReport"
DEVICES = "mobilevd_deploy.profiling.hub.hosted:list_devices"
ERRORS = "mobilevd_deploy.errors"
API = {name: f"{module}.{name}" for name, module in mobilevd_deploy._MODULES.items()}


def load(place: str) -> Any:
    """Return the object at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


# ---- Markdown ----


def escape(text: str) -> str:
    """Escape what Markdown would read as markup, outside of code spans."""
    pieces = re.split(r"(`[^`\n]+`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([<>*_\[\]$|\\])", r"\\\1", p) for p in pieces)


def prose(docstring: str | None) -> str:
    """Return a docstring as Markdown: paragraphs, with indented blocks as they stand."""
    paragraphs = []
    for paragraph in inspect.cleandoc(docstring or "").split("\n\n"):
        if paragraph.startswith("    "):
            paragraphs.append(f"```text\n{textwrap.dedent(paragraph)}\n```")
        else:
            paragraphs.append(escape(paragraph))
    return "\n\n".join(paragraphs)


def cell(text: str) -> str:
    """Return text that fits a table's cell."""
    return " ".join(text.replace("|", "\\|").split())


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the cells are Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


# ---- command line ----


def command_line() -> str:
    """Return every command with its usage, arguments, options and example."""
    import typer

    return "\n\n".join(_commands(typer.main.get_command(load(CLI)), "mobilevd-deploy"))


def _commands(command: Any, name: str) -> Iterator[str]:
    import typer

    context = typer.Context(command, info_name=name)
    yield f"{'#' * (2 + name.count(' '))} `{name}`"
    yield escape(inspect.cleandoc(command.help or ""))
    yield f"```console\n$ {name} {' '.join(command.collect_usage_pieces(context))}\n```"
    records = [
        (f"`{shown}`", _marked_up(help_text))
        for parameter in command.get_params(context)
        if parameter.name != "help" and (record := parameter.get_help_record(context))
        for shown, help_text in [record]
    ]
    if records:
        yield table(("argument or option", "meaning"), records)
    if command.epilog:
        yield _marked_up(command.epilog)
    for word, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _commands(child, f"{name} {word}")


def _marked_up(text: str) -> str:
    """Turn rich's [bold]command[/] into a code span."""
    pieces = re.split(r"\[bold\](.*?)\[/\]", text)
    return "".join(f"`{piece}`" if i % 2 else escape(piece) for i, piece in enumerate(pieces))


# ---- dataclasses ----


def keys(place: str, title: Callable[[str], str] = "`{}`".format) -> str:
    """Return the keys of a dataclass and of those inside it, one section each, in order of declaration."""
    cls = load(place)
    sections: list[str] = []
    _describe(cls, "", title, sections, set())
    return "\n\n".join(sections)


def _describe(cls: Any, where: str, title: Callable[[str], str], sections: list[str], seen: set[Any]) -> None:
    seen.add(cls)
    hints = typing.get_type_hints(cls)
    rows, inner = [], []
    for field in dataclasses.fields(cls):
        below = _dataclass_in(hints[field.name])
        if below is not None and below not in seen:
            inner.append((below, f"{where}.{field.name}" if where else field.name))
        rows.append((f"`{field.name}`", escape(_type(hints[field.name])), _default(field)))
    sections.append(f"### {title(where) if where else f'`{cls.__name__}`'}")
    sections.append(prose(cls.__doc__))
    sections.append(table(("key", "type", "default"), rows))
    for below, path in inner:
        if below not in seen:
            _describe(below, path, title, sections, seen)


def _dataclass_in(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for arg in typing.get_args(hint) if (found := _dataclass_in(arg))), None)


def _type(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{arg!r}`".replace("'", '"') for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else _type(arg) for arg in args)
    if origin is tuple:
        return f"list of {_type(args[0])}" if args[1:] == (Ellipsis,) else f"{len(args)} x {_type(args[0])}"
    if origin is dict:
        return f"table of {_type(args[1])}"
    if dataclasses.is_dataclass(hint):
        return f"table `{hint.__name__}`"  # type: ignore[union-attr]
    return {"str": "text", "bool": "true or false", "Any": "any"}.get(hint.__name__, hint.__name__)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return (
            "none" if field.default is None else f"`{field.default!r}`".replace("'", '"').replace("()", "[]")
        )
    if field.default_factory is not dataclasses.MISSING:
        return "empty" if field.default_factory in (dict, list) else "its defaults"
    return "required"


# ---- what ships ----


def shipped_recipes() -> str:
    """Return the recipes of export/ as a table."""
    import tomllib

    rows = []
    for path in sorted((ROOT / "export").glob("*.toml")):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        quant, npu = values.get("quant"), values.get("npu")
        bits = f"W{quant['weights']}A{quant['activations']}" if quant else "float16" if npu else "float32"
        chips = ", ".join(npu["targets"]) if npu else "none: ONNX only"
        rows.append((f"`{path.stem}`", bits, chips, escape(values["description"])))
    return table(("recipe", "precision", "chips", "for"), rows)


def shipped_presets() -> str:
    """Return the presets of models/ as a table."""
    config = import_module(PRESETS)
    rows = []
    for name in config.preset_names():
        preset = config.load_preset(name)
        model, ladder = preset.model, preset.ladder
        rows.append(
            (
                f"`{name}`",
                f"{model.frames} of {model.width}x{model.height}",
                escape(ladder.title) if ladder else "not a row",
                f"{ladder.tflops:g}" if ladder else "",
            )
        )
    return table(("preset", "frames", "row of the paper's ablation", "published TFLOPs"), rows)


def known_devices() -> str:
    """Return phones and chips of devices.toml as a table."""
    rows = load(DEVICES)(None)
    heads = list(rows[0])
    return table(
        heads, [[escape(str("" if row[head] is None else row[head])) for head in heads] for row in rows]
    )


def benchmark_schema() -> str:
    """Return the JSON Schema of what the app's benchmark writes."""
    (path,) = PACKAGE.rglob("benchmark.schema.json")
    return f"```json\n{path.read_text(encoding='utf-8').strip()}\n```"


# ---- errors ----


@dataclass(frozen=True)
class Raised:
    """One place that makes an error: its class, message and next step; None where there is no text."""

    kind: str
    message: str | None
    next_step: str | None
    module: str
    line: int


def error_classes() -> dict[str, Any]:
    """Return the error classes of errors.py by name, the base first."""
    module = import_module(ERRORS)
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, module.MobileVDError)
    }


def raised_errors(package: Path = PACKAGE) -> list[Raised]:
    """Find every place that makes one of our errors, subclasses outside of errors.py included."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    kinds = {name: name for name in error_classes()}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in kinds:
                        kinds.setdefault(node.name, kinds[base.id])
    found = []
    for path, tree in trees.items():
        module = path.relative_to(package.parent).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := _called(node.func)) in kinds:
                given = next((word.value for word in node.keywords if word.arg == "next_step"), None)
                step = None if given is None else _template(given) or "(given with the message)"
                message = _template(node.args[0]) if node.args else None
                found.append(Raised(kinds[name], message, step, module, node.lineno))
    return found


def _called(function: ast.expr) -> str:
    return (
        function.id
        if isinstance(function, ast.Name)
        else function.attr
        if isinstance(function, ast.Attribute)
        else ""
    )


def _template(node: ast.expr | None) -> str | None:
    """Return the text of an expression, with <name> for what is filled in; None if it is not text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"<{_placeholder(part.value)}>"  # type: ignore[attr-defined]
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = _template(node.left), _template(node.right)
        return (
            None
            if sides == (None, None)
            else "".join(side if side is not None else "<...>" for side in sides)
        )
    if isinstance(node, ast.BoolOp):
        return next((text for value in node.values if (text := _template(value))), None)
    if isinstance(node, ast.IfExp):
        either = _template(node.body), _template(node.orelse)
        return " / ".join(filter(None, either)) or None
    return None


def _placeholder(node: ast.expr) -> str:
    while isinstance(node, ast.Call) and node.args and not isinstance(node.func, ast.Attribute):
        node = node.args[0]
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    return "..."


def error_index() -> str:
    """Return every message by class, with what to do and where it is raised."""
    classes, raised = error_classes(), raised_errors()
    sections = []
    for kind, cls in classes.items():
        rows = [
            (
                escape(" ".join((one.message or "(the message of the cause)").split())),
                escape(one.next_step)
                if one.next_step
                else f"see [{kind}](../how-to/troubleshooting.md#{kind.lower()})",
                f"`{one.module.removeprefix('mobilevd_deploy/')}`",
            )
            for one in raised
            if one.kind == kind
        ]
        if rows:
            sections += [f"## {kind}: exit code {cls.exit_code}", escape(cls.__doc__ or "")]
            sections.append(table(("message", "what to do", "raised in"), dict.fromkeys(rows)))
    return "\n\n".join(sections)


# ---- Python API ----


def python_api() -> str:
    """Return signature and documentation of every public name; sources are read, not imported."""
    package = griffe.load("mobilevd_deploy", search_paths=[str(ROOT)])
    sections = []
    for name, place in sorted(API.items()):
        described = package[place.removeprefix("mobilevd_deploy.")]
        sections += [f"## `{name}`", *_api_object(described, name)]
        if described.is_class:
            for member in described.members.values():
                public = not member.name.startswith("_") and (member.is_function or member.is_attribute)
                if public and member.docstring:
                    sections += [f"### `{name}.{member.name}`", *_api_object(member, member.name)]
    return "\n\n".join(sections)


def _api_object(described: Any, name: str) -> Iterator[str]:
    if described.is_function:
        yield f"```python\n{described.signature(name=name)}\n```"
    elif described.is_class and (fields := _fields(described)):
        yield f"```python\n{name}({', '.join(fields)})\n```"
    elif described.is_attribute and described.annotation is not None:
        yield f"```python\n{name}: {described.annotation}\n```"
    for section in griffe.parse_google(described.docstring, warnings=False) if described.docstring else ():
        yield from _api_section(section)


def _fields(described: Any) -> list[str]:
    return [
        f"{member.name}: {member.annotation}"
        for member in described.members.values()
        if member.is_attribute and "property" not in member.labels and member.annotation is not None
    ]


def _api_section(section: Any) -> Iterator[str]:
    if section.kind.value == "text":
        yield prose(section.value)
        return
    yield f"**{section.kind.value.capitalize()}**"
    for entry in section.value:
        name = getattr(entry, "name", None) or getattr(entry, "annotation", None)
        yield f"- `{name}`: {escape(' '.join(entry.description.split()))}"


PAGES: dict[str, Callable[[], str]] = {
    "command-line.md": command_line,
    "recipe-keys.md": lambda: keys(RECIPE, "`[{}]`".format),
    "model-keys.md": lambda: keys(MODEL_SPEC, "`{}`".format),
    "manifest-keys.md": lambda: keys(MANIFEST),
    "profile-keys.md": lambda: keys(PROFILE),
    "traffic-keys.md": lambda: keys(TRAFFIC),
    "recipes.md": shipped_recipes,
    "presets.md": shipped_presets,
    "devices.md": known_devices,
    "benchmark-schema.md": benchmark_schema,
    "errors.md": error_index,
    "api.md": python_api,
}


def write_all(folder: Path) -> None:
    """Write every page into `folder`; an unchanged page keeps its time, so that a rebuild is short."""
    folder.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        path, text = folder / name, make() + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
