"""What a person looks at first: one HTML file that tells an artifact's story.

It stands alone (no script, no font, no network; its own policy forbids them), follows the reader's light or
dark setting, fits a phone, and is the same text for the same manifest. `render_report` lists the sections
in reading order; each is a function from the manifest to HTML.
"""

from __future__ import annotations

import base64
import html
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Literal

from mobilevd_deploy.artifact import Component, Manifest, NpuBinary, PassReport, TensorSpec
from mobilevd_deploy.profiles import FIGURES, Profile, TrafficReport, TrafficRow, number, total_words
from mobilevd_deploy.progress import duration
from mobilevd_deploy.recipe import GraphForms, Recipe
from mobilevd_deploy.spec import ModelSpec, UNetSpec, from_dict

_MS = "\N{NO-BREAK SPACE}ms"
_SHOWN_BLOCKS = 8  # per component; the others are folded away
DROP_PASS = "drop-temporal-blocks"  # a dropped block is out of the graph only where this pass ran


def render_report(manifest: Manifest, importance: Mapping[str, float], sheet: bytes | None = None) -> str:
    """Lay out a manifest as one self-contained HTML page.

    Args:
        manifest: of the artifact; its `files` are not looked at, since the report is one of them.
        importance: temporal block path -> what it was worth in training, as the checkpoint has it; empty
            where there are no gates.
        sheet: a PNG of what the float and the quantised networks make of one picture.

    Returns:
        The page; equal inputs give equal text.

    Raises:
        SpecError: `manifest.model` or `manifest.recipe` is not a resolved spec or recipe.
    """
    recipe = from_dict(Recipe, manifest.recipe)
    spec = from_dict(ModelSpec, manifest.model)
    sections = (
        *(() if sheet is None else (_section("What it makes", _picture(sheet)),)),
        _section("Components", _components(manifest, recipe)),
        *((_section("Drift", _drift(manifest)),) if manifest.drift else ()),
        *(() if manifest.quality is None else (_section("Quantisation", _quantisation(manifest, recipe)),)),
        *((_section("Sensitivity", _sensitivity(manifest)),) if _noise(manifest) else ()),
        *((_section("For the NPU", _binaries(manifest)),) if manifest.components[0].npu else ()),
        _section("Rewrites", _rewrites(manifest, recipe)),
        _section("Temporal blocks", _temporal(manifest, spec, importance)),
        _section("Graph forms", _graph_forms(recipe)),
        _section("Operations", _operations(manifest)),
        _section("Cost of the export", _cost(manifest)),
        _section("Made with", _tools(manifest)),
        _section("Run it", _run(manifest)),
    )
    return _PAGE.substitute(
        title=_text(manifest.name),
        style=_STYLE,
        header=_header(manifest, recipe),
        figures=_figures(manifest),
        sections="\n".join(sections),
    )


def render_profiles(name: str, profiles: Sequence[Profile], traffic: Sequence[TrafficReport] = ()) -> str:
    """Lay out profiles and planned DRAM traffic of the artifact `name` as one self-contained HTML page.

    Both in the order given.
    """
    lead = (
        "How long one clip takes, and what it moves, by everything that was measured, planned or estimated."
    )
    figures = "".join(
        f"<div><dt>{_text(p.place)}</dt><dd>{_text(total_words(p, _MS))}</dd>"
        f"<dd>{_text(p.how.partition(':')[0])}</dd></div>"
        for p in profiles
    ) + "".join(
        f"<div><dt>DRAM traffic</dt><dd>{_si(report.read + report.written, 'B')}</dd>"
        f"<dd>planned for {_text(report.target)}</dd></div>"
        for report in traffic
    )
    sections = [
        *(_section(_text(p.place), _profile(p)) for p in profiles),
        *(_section(f"DRAM traffic on {_text(report.target)}", _traffic(report)) for report in traffic),
    ]
    return _PAGE.substitute(
        title=_text(f"{name}: profiles"),
        style=_STYLE,
        header=f'<h1>{_text(name)}</h1>\n<p class="lead">{lead}</p>',
        figures=f'<dl class="figures">\n{figures}\n</dl>',
        sections="\n".join(sections),
    )


# ---- sections ----


def _profile(profile: Profile) -> str:
    longest = max((c.ms.median for c in profile.components if c.ms), default=0.0)
    rows = [
        (
            _text(c.name),
            _text(c.error or "failed")
            if c.ms is None
            else _bar("cost", c.ms.median, longest) + number(c.ms.median),
            *map(_text, c.figures),
            "-" if c.check is None else _decibels(c.check.sqnr_db),
        )
        for c in profile.components
    ]
    if profile.in_sum:
        rows.append(("total", _text(total_words(profile)), *map(_text, profile.in_sum.figures), "-"))
    said = (*profile.remarks, *profile.notes, *profile.errors)
    notes = "".join(f"<li>{_text(note)}</li>" for note in said)
    tools = " ".join(f"<span>{_text(n)} <b>{_text(v)}</b></span>" for n, v in profile.tools.items())
    return (
        f"<p>{_text(profile.how)} ({_text(profile.chipset)}), {profile.created[:10]}: "
        f"<b>{_text(total_words(profile, _MS))}</b></p>"
        + _table(("component", "median ms", *FIGURES, "SQNR"), rows, kind="fall")
        + (f'<ul class="note">{notes}</ul>' if notes else "")
        + (f'<div class="chips">{tools}</div>' if tools else "")
    )


def _traffic(report: TrafficReport) -> str:
    head = ("module", "read, written", "bytes")
    most = max((row.read + row.written for row in report.rows), default=0)
    parts = "".join(
        f"<h3>{_text(row.path)}</h3>"
        + _folded(head, [_moved(part, row.read + row.written) for part in row.parts])
        + ("" if row.note is None else f'<p class="note">{_text(row.note)}</p>')
        for row in report.rows
        if row.parts or row.note
    )
    return (
        '<p class="legend"><span><i class="left"></i>read</span><span><i class="added"></i>written</span></p>'
        + _table(head, [_moved(row, most) for row in report.rows], kind="fall")
        + '<p class="note">Bytes to and from DRAM in one run, as the compiler scheduled them for '
        f"{_text(report.precision)} with optimisation mode {report.optimization_mode}: planned, not measured "
        "on a phone. Weights and inputs are only read, so what is written, outputs aside, did not fit on the "
        f"chip. In sum {_si(report.read, 'B')} read and {_si(report.written, 'B')} written.</p>" + parts
    )


def _moved(row: TrafficRow, most: int) -> tuple[str, str, str]:
    whole = most or 1
    read, written = row.read / whole, row.written / whole
    floor = (
        ""
        if row.floor is None
        else f" <small>inputs, outputs and weights once: {_si(row.floor, 'B')}</small>"
    )
    return (
        _text(row.path),
        _bars(_rect("left", 0, read), _rect("added", read, written)),
        f"{_si(row.read, 'B')} + {_si(row.written, 'B')}{floor}",
    )


def _header(manifest: Manifest, recipe: Recipe) -> str:
    source, clip = manifest.source, manifest.pipeline
    about = f": {_text(recipe.description)}" if recipe.description else ""
    return (
        f"<h1>{_text(manifest.name)}</h1>\n"
        f'<p class="lead">Makes {_plural(clip.frames, "frame")} of {clip.width}&times;{clip.height} pixels '
        f"at {clip.fps} fps from one picture, in one step.</p>\n"
        f'<p class="note">From <b>{_text(source.name)}</b> '
        f'(sha256 <code title="{source.sha256}">{source.sha256[:12]}</code>) by recipe '
        f"<b>{_text(recipe.name)}</b>{about}, on "
        f"{manifest.created[:10]} at {manifest.created[11:16]} UTC.</p>"
    )


def _figures(manifest: Manifest) -> str:
    components = manifest.components
    memory = max((cost.peak_bytes for cost in manifest.stages.values()), default=0)
    parameters, flops = sum(c.parameters for c in components), sum(c.flops for c in components)
    most, heaviest = max(components, key=lambda c: c.parameters), max(components, key=lambda c: c.flops)
    worst, where = _worst_drift(manifest)
    figures = (
        ("on disk", _si(sum(c.bytes for c in components), "B"), _plural(len(components), "component")),
        ("parameters", _si(parameters), f"{_si(most.parameters)} in {_text(most.name)}"),
        ("per clip", _si(flops, "FLOPs"), f"{_share(heaviest.flops, flops)} in {_text(heaviest.name)}"),
        ("worst SQNR", worst, where),
        (
            "export time",
            duration(sum(cost.seconds for name, cost in manifest.stages.items() if ": " not in name)),
            f"peak memory {_si(memory, 'B')}" if memory else "",
        ),
    )
    tiles = (f"<div><dt>{label}</dt><dd>{value}</dd><dd>{note}</dd></div>" for label, value, note in figures)
    return '<dl class="figures">\n' + "\n".join(tiles) + "\n</dl>"


def _worst_drift(manifest: Manifest) -> tuple[str, str]:
    final = {c.name: _final_drift(manifest, c.name) for c in manifest.components}
    measured = {name: drift for name, drift in final.items() if drift is not None}
    if not measured:
        return "&ndash;", "not measured"
    name = min(measured, key=measured.__getitem__)
    return _decibels(measured[name]), "all components" if measured[name] == math.inf else _text(name)


def _final_drift(manifest: Manifest, component: str) -> float | None:
    """SQNR in dB after the last stage that measured the component, inf where identical, None if none did."""
    values = [stage[component] for stage in manifest.drift.values() if component in stage]
    if not values:
        return None
    return math.inf if values[-1] is None else values[-1]


def _final_words(manifest: Manifest, component: str) -> str:
    final = _final_drift(manifest, component)
    return "not measured" if final is None else _decibels(final)


def _components(manifest: Manifest, recipe: Recipe) -> str:
    most = max(c.flops for c in manifest.components)
    rows = [
        (
            _text(c.name),
            _tensors(c),
            _si(c.bytes, "B"),
            _si(c.parameters),
            _si(c.flops, "FLOPs") + _bar("cost", c.flops, most),
            _final_words(manifest, c.name),
        )
        for c in manifest.components
    ]
    head = ("component", "inputs → outputs", "files", "parameters", "one run", "SQNR")
    return (
        _table(head, rows, wide=1)
        + '<p class="note">In running order. FLOPs are 2 per multiply-accumulate, counted on the graphs. '
        "SQNR is that of the last form that was measured, against the network in float32; Drift has all of "
        f"them. The export fails below {recipe.floors.onnx_sqnr_db:g} dB for the float graphs.</p>"
    )


def _picture(sheet: bytes) -> str:
    data = base64.b64encode(sheet).decode("ascii")
    return (
        f'<img class="sheet" alt="input, float clip and quantised clip" src="data:image/png;base64,{data}">'
    )


def _quantisation(manifest: Manifest, recipe: Recipe) -> str:
    quality, scheme, floors = manifest.quality, recipe.quant, recipe.floors
    assert quality is not None
    assert scheme is not None
    rows = [
        (
            _text(name),
            _decibels(manifest.drift.get("quantised", {}).get(name)),
            ", ".join(f"{_text(tensor)} {ratio:.2f}" for tensor, ratio in ratios.items()),
        )
        for name, ratios in quality.conditioning.items()
    ]
    clip = _decibels(quality.clip_psnr_db)
    table = _table(("component", "SQNR against float", "answer to each input"), rows, kind="fall")
    return table + (
        f'<p class="note">{scheme.weights}-bit weights, {scheme.activations}-bit activations, calibrated on '
        f"{_plural(quality.samples, 'picture')} ({_text(quality.calibration)}) and judged on others. "
        f"The clip is {clip} PSNR from the float clip. The answer is how far an output moves when one input "
        "alone changes, quantised over float: 1 is perfect, 0 a dead input. The export fails below "
        f"{floors.quantised_sqnr_db:g} dB, a clip below {floors.clip_psnr_db:g} dB, or an answer below "
        f"{floors.conditioning:g}.</p>"
    )


def _noise(manifest: Manifest) -> dict[str, list[tuple[str, float]]]:
    """Return by component the blocks with the noise of each alone, as parts of all noise, most first."""
    shares = {}
    for name, blocks in (manifest.quality.sensitivity if manifest.quality else {}).items():
        powers = {block: 0.0 if db is None else 10 ** (-db / 10) for block, db in blocks.items()}
        if whole := sum(powers.values()):
            ranked = sorted(powers.items(), key=lambda item: -item[1])
            shares[name] = [(block, power / whole) for block, power in ranked]
    return shares


def _sensitivity(manifest: Manifest) -> str:
    assert manifest.quality is not None
    parts = []
    for name, ranked in _noise(manifest).items():
        decibels, most = manifest.quality.sensitivity[name], ranked[0][1]
        rows = [
            (_text(block), _bar("cost", share, most), f"{_share(share, 1)}, {_decibels(decibels[block])}")
            for block, share in ranked
        ]
        parts.append(f"<h3>{_text(name)}</h3>{_folded(('block', 'share of the noise', 'SQNR alone'), rows)}")
    return "".join(parts) + (
        '<p class="note">SQNR of the output with nothing but this block quantised, and its share of the sum '
        "of such noise. The blocks on top are those to give more bits by a rule.</p>"
    )


def _binaries(manifest: Manifest) -> str:
    rows = [
        (
            _text(component.name),
            f"{_text(binary.target)} <small>Hexagon V{binary.arch}, {_text(binary.precision)}, "
            f"QAIRT {_text(binary.sdk)}</small>",
            _si(binary.bytes, "B")
            + (f" in {len(binary.parts)} parts" if len(binary.parts) > 1 else "")
            + f" <small>{_simulated(manifest, component, binary)}</small>",
            "unknown" if binary.dram_bytes is None else _si(binary.dram_bytes, "B"),
        )
        for component in manifest.components
        for binary in component.npu
    ]
    return (
        _table(("component", "target", "context binary", "DRAM traffic"), rows, kind="fall")
        + '<p class="note">Target and Hexagon version were read back from each binary. DRAM traffic is what '
        "one run moves both ways, by the compiler&rsquo;s plan. SQNR is that of the "
        "binary on Qualcomm&rsquo;s x86 simulator of the NPU against the float graph; no number here was "
        "measured on a phone.</p>"
    )


def _simulated(manifest: Manifest, component: Component, binary: NpuBinary) -> str:
    drift = manifest.drift.get(f"npu.{binary.target}", {})
    if component.name not in drift:
        return "not simulated"
    return f"{_decibels(drift[component.name])} on the simulator"


def _tensors(component: Component) -> str:
    inputs = "".join(f"<li>{_tensor(t)} <small>{_provider(t)}</small></li>" for t in component.inputs)
    outputs = "".join(f'<li class="out">{_tensor(t)}</li>' for t in component.outputs)
    return f'<ul class="tensors">{inputs}{outputs}</ul>'


def _tensor(tensor: TensorSpec) -> str:
    shape = "&times;".join(map(str, tensor.shape))
    dtype = "" if tensor.dtype == "float32" else f" {tensor.dtype}"
    return f'<code>{_text(tensor.name)}</code> <span class="shape">{shape}{dtype}</span>'


def _provider(tensor: TensorSpec) -> str:
    kind, _, name = (tensor.source or "").partition(":")
    if kind == "component":
        return f"from {_text(name)}"
    return "the picture" if kind == "image" else f"noise stream {name}"


def _drift(manifest: Manifest) -> str:
    stages = dict(manifest.drift)
    if manifest.passes:
        stages = {"rewritten": {"unet": manifest.passes[-1].sqnr_db}} | stages
    rows = [
        (
            _text(c.name),
            *(_decibels(values[c.name]) if c.name in values else "&ndash;" for values in stages.values()),
        )
        for c in manifest.components
    ]
    names = (_text(name.replace("npu.", "simulated ")) for name in stages)
    return _table(("component", *names), rows, kind="fall even") + (
        '<p class="note">SQNR against the network in float32 behind each stage, every component by itself, '
        "on what the float run gave.</p>"
    )


def _rewrites(manifest: Manifest, recipe: Recipe) -> str:
    passes = manifest.passes
    if not passes:
        return "<p>None: the recipe names no rewrite, so the UNet was exported as it was trained.</p>"
    parameters = [(p.params_before, p.params_after) for p in passes]
    flops = [(p.flops_before, p.flops_after) for p in passes]

    def row(name: str, facts: str, params: tuple[int, int], cost: tuple[int, int]) -> tuple[str, ...]:
        head = f"{_text(name)}<small>{facts}</small>"
        return head, _fall(params, parameters), _fall(cost, flops, "FLOPs")

    rows = [row("trained UNet", "before any rewrite", (parameters[0][0],) * 2, (flops[0][0],) * 2)]
    rows += [
        row(p.name, _pass_facts(p), steps, cost)
        for p, steps, cost in zip(passes, parameters, flops, strict=True)
    ]
    rows.append(
        row(
            "rewritten UNet",
            _plural(len(passes), "rewrite"),
            (parameters[0][0], parameters[-1][1]),
            (flops[0][0], flops[-1][1]),
        )
    )
    return (
        '<p class="legend"><span><i class="left"></i>what is left</span>'
        '<span><i class="saved"></i>saved</span><span><i class="added"></i>added</span></p>'
        + _table(("rewrite", "parameters", "FLOPs on the probe"), rows, kind="fall")
        + '<p class="note">Each rewrite is proven: the one-step map on a fixed probe against the untouched '
        f"network's, at least {recipe.floors.rewrite_sqnr_db:g} dB SQNR. For a large network that probe is a "
        "cut of the full latents, so its FLOPs are to be read as shares.</p>"
    )


def _pass_facts(report: PassReport) -> str:
    return f"{_plural(len(report.changed), 'module')} changed, {_decibels(report.sqnr_db)}"


def _fall(step: tuple[int, int], steps: Sequence[tuple[int, int]], unit: str = "") -> str:
    """One row of a waterfall: what is left after `step`, what it took away or added, and the figure."""
    before, after = step
    full = max(map(max, steps)) or 1
    changed = (
        ""
        if before == after
        else _rect(
            "saved" if after < before else "added", min(before, after) / full, abs(before - after) / full
        )
    )
    change = f" <small>{_change(before, after)}</small>" if changed else ""
    left = _rect("left", 0, min(before, after) / full)
    return f"{_bars(left, changed)}{_si(after, unit)}{change}"


def _change(before: int, after: int) -> str:
    percent = 100 * (after - before) / before if before else math.inf
    if abs(percent) < 0.05:
        return "&lt; 0.1 %"
    return f"{'&minus;' if percent < 0 else '+'}{abs(percent):.1f} %"


@dataclass(frozen=True)
class _Block:
    """A temporal block of the UNet and where it stands."""

    path: str
    kind: Literal["resnet", "transformer"]
    level: int


def temporal_block_groups(unet: UNetSpec) -> list[list[_Block]]:
    """List the temporal blocks in running order: one group per down block, the middle, one per up block.

    The names are those of diffusers' module tree. Up blocks run from the lowest level and have a layer
    more than down blocks; the middle has two resnets around one transformer.
    """
    levels, layers = len(unet.block_out_channels), unet.layers_per_block

    def stack(name: str, level: int, resnets: int, transformers: int) -> list[_Block]:
        blocks = []
        for index in range(resnets):
            blocks.append(_Block(f"{name}.resnets.{index}", "resnet", level))
            if index < transformers:
                blocks.append(_Block(f"{name}.attentions.{index}", "transformer", level))
        return blocks

    def transformers(level: int, resnets: int) -> int:
        return resnets if unet.attention[level] else 0

    down = [stack(f"down_blocks.{i}", i, layers, transformers(i, layers)) for i in range(levels)]
    middle = stack("mid_block", levels - 1, 2, 1)
    up = [
        stack(f"up_blocks.{i}", level, layers + 1, transformers(level, layers + 1))
        for i, level in enumerate(reversed(range(levels)))
    ]
    return [*down, middle, *up]


def _temporal(manifest: Manifest, spec: ModelSpec, importance: Mapping[str, float]) -> str:
    groups = temporal_block_groups(spec.unet)
    blocks = [block for group in groups for block in group]
    kept = spec.unet.kept_temporal_blocks
    stays = {block.path for block in blocks if kept is None or block.path in kept}
    values = {block.path: importance[block.path] for block in blocks if block.path in importance}
    ranked = len(set(values.values())) > 1
    if len(stays) == len(blocks):
        summary = f"All {len(blocks)} are kept."
    else:
        kinds = {
            kind: [block.path in stays for block in blocks if block.kind == kind]
            for kind in ("transformer", "resnet")
        }
        parts = " and ".join(f"{sum(flags)} of {len(flags)} {kind}s" for kind, flags in kinds.items())
        summary = f"<b>{len(stays)} of {len(blocks)}</b> are kept: {parts}."
        if all(report.name != DROP_PASS for report in manifest.passes):
            summary += f" The recipe leaves {DROP_PASS} out, so the others are in the graph with gate 0."
    if ranked:
        summary += f" Height is importance, {min(values.values()):.3g} to {max(values.values()):.3g}."
    legend = "".join(
        f'<span><i class="{kind} {state}"></i>{kind}, {state}</span>'
        for kind in ("transformer", "resnet")
        for state in ("kept", "dropped")
        if state == "kept" or len(stays) < len(blocks)
    )
    rows = [
        (
            f"<code>{block.path}</code>",
            str(block.level),
            f"{values[block.path]:.4f}" if block.path in values else "&ndash;",
            "kept" if block.path in stays else "dropped",
        )
        for block in blocks
    ]
    return (
        f'<p>{summary}</p><p class="legend">{legend}</p>'
        + _map(spec, groups, stays, values if ranked else {})
        + f"<details><summary>The {len(blocks)} by name</summary>"
        + _table(("block", "level", "importance", "state"), rows, kind="list")
        + "</details>"
    )


def _map(
    spec: ModelSpec, groups: Sequence[Sequence[_Block]], stays: set[str], values: Mapping[str, float]
) -> str:
    """Draw the U: running order to the right, levels downwards. Only x scales, so text keeps its size."""
    gap, heading, band, bar = 0.7, 22, 92, 56
    levels = len(spec.unet.block_out_channels)
    column = 100 / (sum(map(len, groups)) + gap * (len(groups) - 1))
    low, high = min([0.0, *values.values()]), max([0.0, *values.values()])
    floors = [heading + band * level + 24 + bar for level in range(levels)]
    shapes, ends, x = [], [], 0.0
    for group in groups:
        ends.append((x, x + column * len(group)))
        for block in group:
            value, state = values.get(block.path), "kept" if block.path in stays else "dropped"
            # Even the least important block stays visible.
            share = 1.0 if not values else 0.0 if value is None else (value - low) / (high - low)
            height = bar * (0.12 + 0.88 * share)
            worth = "" if value is None else f", importance {value:.4f}"
            shapes.append(
                f'<rect class="{block.kind} {state}" x="{x + 0.1 * column:.3f}%" width="{0.8 * column:.3f}%" '
                f'y="{floors[block.level] - height:.1f}" height="{height:.1f}" rx="2">'
                f"<title>{block.path}: {state}{worth}</title></rect>"
            )
            x += column
        x += gap * column
    skips = [
        f'<line x1="{ends[level][1]:.3f}%" x2="{ends[-1 - level][0]:.3f}%" y1="{y - 0.5}" y2="{y - 0.5}"/>'
        for level, y in enumerate(floors[:-1])
    ]
    labels = [
        f'<text x="{ends[level][0]:.3f}%" y="{y - bar - 8}">{_level(spec, level)}</text>'
        for level, y in enumerate(floors)
    ]
    middle = sum(ends[levels]) / 2
    places = (
        f'<text class="place" x="0" y="12">down</text>'
        f'<text class="place" x="{middle:.3f}%" y="{floors[-1] + 18}" text-anchor="middle">middle</text>'
        f'<text class="place" x="100%" y="12" text-anchor="end">up</text>'
    )
    return (
        f'<svg class="map" role="img" aria-label="temporal blocks by level" height="{floors[-1] + 26}">'
        + "".join((*skips, *shapes, *labels, places))
        + "</svg>"
    )


def _level(spec: ModelSpec, level: int) -> str:
    height, width = spec.latent_size
    halved = level > 0 and spec.unet.temporal_multiscaling != "none"
    frames, channels = spec.frames // (2 if halved else 1), spec.unet.block_out_channels[level]
    return (
        f"<tspan>level {level}</tspan> {_plural(frames, 'frame')} of {width >> level}&times;{height >> level}"
        f'<tspan class="roomy">, {channels} channels</tspan>'
    )


_FORMS: dict[str, dict[str, str]] = {
    "attention": {
        "whole": "one score map for all heads",
        "tiles": "score maps of {query_tile} query positions at a time",
        "heads": "one head after the other, {query_tile} query positions at a time",
    },
    "frames": {"batch": "all at once, as the batch axis", "sequential": "one after the other"},
    "linear": {"matmul": "matrix products", "conv": "1&times;1 convolutions"},
    "group_norm": {
        "group": "the operator itself",
        "instance": "instance norm over the reshaped map, then scale and shift per channel",
    },
    "upsample": {
        "nearest": "nearest neighbour, then a 3&times;3 convolution",
        "subpixel": "four 2&times;2 convolutions on the small map, interleaved",
    },
    "temporal_conv": {
        "rows": "frames as rows of the map",
        "columns": "frames as columns of the map",
    },
}
_FORM_NAMES = {
    "attention": "Attention",
    "frames": "Frames",
    "linear": "Linear layers",
    "group_norm": "Group norm",
    "upsample": "Upsampling",
    "temporal_conv": "Convolutions over time",
}


def graph_form_words(forms: GraphForms) -> dict[str, str]:
    """Say what a recipe chose: name of the part -> its form in words."""
    said = {
        _FORM_NAMES[name]: words[getattr(forms, name)].format(query_tile=forms.query_tile)
        for name, words in _FORMS.items()
    }
    if forms.attention != "whole" and forms.whole_up_to:
        said["Attention"] += f"; whole on maps of up to {forms.whole_up_to} tokens"
    return said


def _graph_forms(recipe: Recipe) -> str:
    simplified = "simplified by onnxsim" if recipe.onnx.simplify else "not simplified"
    words = graph_form_words(recipe.graph) | {"ONNX": f"opset {recipe.onnx.opset}, {simplified}"}
    return _definitions((name, text) for name, text in words.items())


def _operations(manifest: Manifest) -> str:
    def counts(component: Component) -> str:
        ranked = sorted(component.ops.items(), key=lambda item: (-item[1], item[0]))
        chips = " ".join(f"<span>{_text(op)} <b>{count}</b></span>" for op, count in ranked)
        return f'<div class="chips">{chips}</div>'

    return _definitions(
        (f"{_text(c.name)}<small>{_plural(sum(c.ops.values()), 'node')}</small>", counts(c))
        for c in manifest.components
    )


def _cost(manifest: Manifest) -> str:
    if not manifest.stages:
        return "<p>Not recorded.</p>"
    longest = max(cost.seconds for cost in manifest.stages.values())
    most = max(cost.peak_bytes for cost in manifest.stages.values())
    rows = [
        (
            _text(name),
            _bar("cost", cost.seconds, longest) + duration(cost.seconds),
            _bar("cost", cost.peak_bytes, most) + _si(cost.peak_bytes, "B"),
        )
        for name, cost in manifest.stages.items()
    ]
    return _table(("stage", "time", "peak memory"), rows, kind="fall")


def _tools(manifest: Manifest) -> str:
    chips = " ".join(
        f"<span>{_text(name)} <b>{_text(version)}</b></span>" for name, version in manifest.tools.items()
    )
    return f'<div class="chips">{chips}</div>'


def _run(manifest: Manifest) -> str:
    # "./" keeps a name that starts with a dash from being read as an option.
    name = manifest.name if not manifest.name.startswith("-") else f"./{manifest.name}"
    command = f"mobilevd-deploy generate PICTURE --artifact {shlex.quote(name)} -o clip.gif"
    return (
        f"<pre><code>{_text(command)}</code></pre>"
        '<p class="note">In the folder that holds the artifact. Any picture will do: it is scaled and '
        "cut from the centre. The same seed (<code>--seed N</code>) gives the same clip.</p>"
    )


# ---- parts ----


def _text(value: object) -> str:
    """Escape for element content and quoted attributes."""
    return html.escape(str(value), quote=True)


def _si(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: "1.52 G", "4.34 TFLOPs", "512 B"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + f"\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{value:g}\N{NO-BREAK SPACE}{unit}".rstrip()


def _decibels(value: float | None) -> str:
    return "identical" if value is None or value == math.inf else f"{value:.1f}\N{NO-BREAK SPACE}dB"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "all"


def _rect(kind: str, x: float, width: float) -> str:
    return f'<rect class="{kind}" x="{100 * x:.2f}%" width="{100 * width:.2f}%" height="100%"/>'


def _bar(kind: str, value: float, most: float) -> str:
    return _bars(_rect(kind, 0, value / most if most else 0))


def _bars(*rects: str) -> str:
    # Hidden from screen readers: the figure beside it says the same.
    return f'<svg class="bar" aria-hidden="true">{"".join(rects)}</svg>'


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>"


def _definitions(items: Iterable[tuple[str, str]]) -> str:
    return (
        '<dl class="pairs">'
        + "".join(f"<div><dt>{n}</dt><dd>{text}</dd></div>" for n, text in items)
        + "</dl>"
    )


def _folded(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out the first rows, and the others behind a line that a click opens."""
    rest = rows[_SHOWN_BLOCKS:]
    more = f"<details><summary>{len(rest)} more</summary>{_table(head, rest, kind='fall')}</details>"
    return _table(head, rows[:_SHOWN_BLOCKS], kind="fall") + (more if rest else "")


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "plain", wide: int | None = None
) -> str:
    """Lay out cells of HTML; on a phone each row becomes a card, whose cells name their column.

    `kind` is the CSS class, `wide` the column of free text.
    """

    def cell(column: int, content: str) -> str:
        mark = ' class="wide"' if column == wide else ""
        return f'<td{mark} data-label="{head[column]}">{content}</td>'

    heads = "".join(
        f'<th scope="col"{" class=wide" if i == wide else ""}>{h}</th>' for i, h in enumerate(head)
    )
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(cell(i, c) for i, c in enumerate(rest, 1))}</tr>'
        for first, *rest in rows
    )
    return f'<table class="{kind}"><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>'


_STYLE = """
:root {
  --paper: #fcfcfa; --card: #f3f3ef; --ink: #1d1f24; --quiet: #63676f; --line: #dfdfd9;
  --left: #b9c0cf; --saved: #2f9e6e; --added: #d1633c; --cost: #8f9ab0;
  --transformer: #4a57c8; --resnet: #c77a14;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1f2227; --ink: #e7e8ea; --quiet: #9a9fa9; --line: #31353c;
    --left: #4c5467; --saved: #4cc38a; --added: #ee8a63; --cost: #6b7690;
    --transformer: #8e9bff; --resnet: #e9a548;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
h1 { margin: 0; font-size: 2.1rem; line-height: 1.15; letter-spacing: -.02em; }
h2 { margin: 3rem 0 .8rem; font-size: 1.25rem; letter-spacing: -.01em; }
h3 { margin: 1.4rem 0 .4rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .875em; }
pre { margin: .5rem 0; padding: .8rem 1rem; background: var(--card); border-radius: .5rem;
  white-space: pre-wrap; }
small, .note, .figures dt, .figures dd + dd, thead, .shape { color: var(--quiet); font-weight: 400; }
small, .note { font-size: .875rem; }
.note { margin-top: .8rem; }
.note b { color: var(--ink); font-weight: 600; }
.lead { font-size: 1.15rem; }

.figures { display: grid; grid-template-columns: repeat(5, 1fr); gap: .75rem; margin: 1.8rem 0 0; }
.figures div { padding: .8rem 1rem; background: var(--card); border-radius: .5rem; }
.figures dt, .figures dd + dd { font-size: .875rem; }
.figures dd { margin: 0; font-size: 1.4rem; font-weight: 600; line-height: 1.3; letter-spacing: -.01em; }
.figures dd + dd { letter-spacing: 0; }

table { width: 100%; border-collapse: collapse; }
th, td { padding: .6rem .9rem .6rem 0; border-top: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { padding-top: 0; border: 0; font-size: .875rem; font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
tbody th { font-weight: 600; }
th small, td small { display: block; }
tbody td { white-space: nowrap; }
tbody td.wide { white-space: normal; }
table.plain { table-layout: fixed; }
table.plain th { width: 11.5%; }
table.plain th:first-child { width: 15%; }
table.plain th.wide { width: 39%; }
table.plain th:nth-child(n+3), table.plain td:nth-child(n+3) { text-align: right; }
table.fall th:first-child { width: 34%; }
table.fall th, table.fall td { width: 33%; }
table.even { table-layout: fixed; }
table.even th, table.even td { width: auto; }
table.fall small { display: inline; }
table.fall th small { display: block; }
table.fall tbody tr:last-child > * { border-bottom: 1px solid var(--line); }
table.list { font-size: .875rem; margin-top: .5rem; }
table.list th, table.list td { padding: .2rem .9rem .2rem 0; font-weight: 400; }
.tensors { margin: 0; padding: 0; list-style: none; }
.tensors small { display: inline; }
.tensors .out::before { content: "→ "; color: var(--quiet); }

svg.bar { display: block; width: 100%; height: .8rem; margin: .35rem 0 .25rem; }
table.plain svg.bar { height: .25rem; margin: .3rem 0 0; }
rect.left { fill: var(--left); } rect.saved { fill: var(--saved); }
rect.added { fill: var(--added); } rect.cost { fill: var(--cost); }

.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; color: var(--quiet); font-size: .875rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem; border-radius: 2px;
  vertical-align: -.08em; }
i.left { background: var(--left); } i.saved { background: var(--saved); }
i.added { background: var(--added); }
.transformer { --hue: var(--transformer); } .resnet { --hue: var(--resnet); }
i.kept { background: var(--hue); }
i.dropped { box-shadow: inset 0 0 0 1.5px var(--hue); opacity: .75; }
svg.map { display: block; width: 100%; margin-top: 1rem; overflow: visible; }
rect.kept { fill: var(--hue); }
rect.dropped { fill: var(--paper); stroke: var(--hue); stroke-width: 1.25; opacity: .75; }
.map line { stroke: var(--quiet); opacity: .5; stroke-dasharray: 3 3; }
.map text { fill: var(--quiet); font-size: .8rem; }
.map text tspan:first-child { fill: var(--ink); font-weight: 600; }

.pairs { margin: 0; }
.pairs > div { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; padding: .5rem 0;
  border-top: 1px solid var(--line); }
.pairs dt { font-weight: 600; } .pairs dt small { display: block; } .pairs dd { margin: 0; }
.sheet { display: block; max-width: 100%; border-radius: .5rem; image-rendering: pixelated; }
.chips { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; }
.chips span { color: var(--quiet); } .chips b { color: var(--ink); font-weight: 600; }
details { margin-top: .8rem; } summary { color: var(--quiet); cursor: pointer; font-size: .875rem; }

/* Too narrow for six columns: each component becomes a card, and on a phone the other tables do too. */
@media (max-width: 60rem) {
  .figures { grid-template-columns: repeat(3, 1fr); }
  table.plain thead { display: none; }
  table.plain, table.plain tbody { display: block; }
  table.plain tr { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .5rem 1rem;
    padding: .8rem 0; border-top: 1px solid var(--line); }
  table.plain tr > * { padding: 0; border: 0; width: auto !important; text-align: left !important; }
  table.plain tbody th, table.plain td.wide { grid-column: 1 / -1; }
  table.plain td:not(.wide)::before { content: attr(data-label); }
  td::before { display: block; color: var(--quiet); font-size: .875rem; }
}
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.7rem; }
  h2 { margin-top: 2.4rem; }
  .roomy { display: none; }
  .pairs > div { grid-template-columns: 1fr; gap: .1rem; }
  .figures { grid-template-columns: 1fr 1fr; gap: .5rem; }
  .figures div { padding: .7rem .8rem; }
  .figures div:nth-child(odd):last-child { grid-column: 1 / -1; }
  .figures dd { font-size: 1.2rem; }
  table.fall thead { display: none; }
  table.fall, table.fall tbody { display: block; }
  table.fall tr { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1rem; padding: .8rem 0;
    border-top: 1px solid var(--line); }
  table.fall tr > * { padding: 0; border: 0 !important; width: auto !important; white-space: normal; }
  table.fall tbody th { grid-column: 1 / -1; }
  table.fall td::before { content: attr(data-label); }
}
"""

# The policy makes "self-contained" a fact: nothing is fetched or run, whatever a name in the manifest says.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
$header
$figures
</header>
<main>
$sections
</main>
</body>
</html>
""")
