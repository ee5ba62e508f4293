"""Tables and sentences for the terminal, made from results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mobilevd_deploy.base.tensors import decibels
from mobilevd_deploy.profiling.profile import FIGURES, head_words, number, source_words, total_words

if TYPE_CHECKING:
    from mobilevd_deploy.artifact.artifact import Artifact
    from mobilevd_deploy.artifact.diff import DiffRow
    from mobilevd_deploy.doctor import DoctorFinding
    from mobilevd_deploy.profiling.hub.ledger import Run
    from mobilevd_deploy.profiling.profile import OutputCheck, Profile, TrafficReport
    from mobilevd_deploy.tune import Tuned
    from mobilevd_deploy.verify import ArtifactCheck

_BAR = 30  # characters of the longest bar


# ---- export ----


def export_lines(artifact: Artifact) -> Iterator[str]:
    """Summarise an artifact: size, drift, quantisation and context binaries, and where its page is."""
    manifest = artifact.manifest
    drifts = [value for value in manifest.drift["onnx"].values() if value is not None]
    worst = f"{min(drifts):.0f} dB" if drifts else "identical"
    parameters = sum(c.parameters for c in manifest.components) / 1e6
    tflops = sum(c.flops for c in manifest.components) / 1e12
    yield (
        f"{artifact.root}: {artifact.bytes / 1e6:.1f} MB, {parameters:.1f} M parameters, "
        f"{tflops:.3g} TFLOPs per clip, {worst} from the trained network"
    )
    if manifest.quality is not None:
        quantised = min(value for value in manifest.drift["quantised"].values() if value is not None)
        psnr = _figure(manifest.quality.clip_psnr_db)
        yield f"quantised: worst component {quantised:.1f} dB, clip {psnr} dB PSNR from the float clip"
    for binary in manifest.components[-1].npu:
        size = sum(b.bytes for c in manifest.components for b in c.npu if b.target == binary.target)
        simulated = [v for v in manifest.drift.get(f"npu.{binary.target}", {}).values() if v is not None]
        drift = f"worst on the simulator {min(simulated):.1f} dB" if simulated else "not simulated"
        yield f"{binary.target}: {binary.precision} context binaries, {size / 1e6:.1f} MB, {drift}"
    yield f"look at {artifact.root / 'report.html'}"


def render_search(found: Tuned) -> RenderableType:
    """Lay out the steps of a search for bit widths."""
    table = Table("bit operations", "predicted, dB", "simulated, dB", "changed")
    for step in found.steps:
        changed = f"{step.block} to w{step.weights}a{step.activations}" if step.block else "w8a8 throughout"
        figures = (_figure(math.inf if db is None else db) for db in (step.predicted_db, step.measured_db))
        table.add_row(f"{step.bit_operations:.3f}", *figures, changed)
    return table


def search_line(found: Tuned) -> str:
    """Summarise a search: SQNR, cost, and the number of blocks at each bit width."""
    counts = Counter(f"w{weights}a{activations}" for weights, activations in found.bits.values())
    blocks = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items()))
    return f"{found.sqnr_db:.1f} dB at {found.bit_operations:.2f} of W8A16's bit operations; {blocks}"


def render_checks(checks: Iterable[ArtifactCheck]) -> RenderableType:
    """Lay out the checks of `verify`."""
    table = Table("", "check", "component", "")
    for check in checks:
        table.add_row("ok" if check.ok else "FAILED", check.what, check.component or "", check.detail)
    return table


# ---- measure ----


def render_profile(profile: Profile) -> RenderableType:
    """Lay out a profile: its source, a table with bars, the slowest operations, notes and errors."""
    table = Table(title=head_words(profile), title_justify="left", title_style="bold")
    for name in ("component", "median ms", *FIGURES, "SQNR"):
        table.add_column(name, justify="left" if name in ("component", "ops") else "right")
    table.add_column("")
    longest = max((c.ms.median for c in profile.components if c.ms), default=0.0)
    for component in profile.components:
        ms = component.ms
        table.add_row(
            Text(component.name),
            "failed" if ms is None else number(ms.median),
            *map(Text, component.figures),
            _sqnr(component.check),
            "" if ms is None else _bar(ms.median, longest),
        )
    table.add_section()
    table.add_row(
        "total", total_words(profile), *(map(Text, profile.in_sum.figures) if profile.in_sum else ())
    )
    lines = [
        *profile.remarks,
        *(f"note: {note}" for note in profile.notes),
        *(f"failed: {error}" for error in profile.errors),
    ]
    return Group(table, *(Text(line) for line in lines))


def render_comparison(profiles: Sequence[Profile]) -> RenderableType:
    """Lay out profiles side by side: medians in ms by component, totals, and a bar for each."""
    table = Table("component", title="median ms", title_justify="left", title_style="bold")
    for profile in profiles:
        table.add_column(
            Text(f"{profile.place}\n{source_words(profile)}, {profile.created[:10]}"), justify="right"
        )
    names = dict.fromkeys(component.name for profile in profiles for component in profile.components)
    for name in names:
        found = [next((c.ms for c in p.components if c.name == name), None) for p in profiles]
        table.add_row(Text(name), *(number(ms.median if ms else None) for ms in found))
    table.add_section()
    table.add_row("total", *(total_words(profile) for profile in profiles))
    totals = [profile.total_ms for profile in profiles if profile.total_ms is not None]
    bars = []
    for profile in profiles:
        if profile.total_ms is not None:
            bar = _bar(profile.total_ms, max(totals))
            bars.append(
                Text(
                    f"{bar:<{_BAR}} {total_words(profile, ' ms')}  {profile.place} ({source_words(profile)})"
                )
            )
    return Group(table, *bars)


def render_jobs(runs: Iterable[Run]) -> RenderableType:
    """Lay out the AI Hub jobs of runs."""
    table = Table("run", "component", "job", "device", "state", "id", "page")
    for run in runs:
        for job in run.jobs:
            state = job.state if job.reason is None else f"{job.state}: {job.reason}"
            cells = (run.begun, job.component, job.kind, job.device, state, job.id, job.url)
            table.add_row(*map(Text, cells))
    return table


def render_traffic(report: TrafficReport) -> RenderableType:
    """Lay out planned DRAM traffic by module, with bars, its sum, and notes."""
    title = (
        f"DRAM traffic as scheduled: {report.precision} for {report.target}, mode {report.optimization_mode}"
    )
    table = Table("module", "read, MB", "written, MB", "floor, MB", "", title=title)
    most = max(row.read + row.written for row in report.rows)
    for row in report.rows:
        for shown, indent in ((row, ""), *((part, "  ") for part in row.parts)):
            bar = "█" * round(_BAR * (shown.read + shown.written) / most) if most else ""
            floor = "" if shown.floor is None else f"{shown.floor / 1e6:,.1f}"
            name, read, written = indent + shown.path, shown.read / 1e6, shown.written / 1e6
            table.add_row(name, f"{read:,.1f}", f"{written:,.1f}", floor, bar)
    table.add_section()
    table.add_row("total", f"{report.read / 1e6:,.1f}", f"{report.written / 1e6:,.1f}")
    return Group(table, *(f"{row.path}: {row.note}" for row in report.rows if row.note is not None))


def traffic_line(report: TrafficReport) -> str:
    """Summarise planned DRAM traffic."""
    read, written = report.read / 1e6, report.written / 1e6
    return f"DRAM traffic planned for {report.target}: {read:,.1f} MB read, {written:,.1f} MB written"


def render_devices(rows: Iterable[dict[str, Any]], *, live: bool) -> RenderableType:
    """Lay out the rows of `list_devices`; `live`: they are from AI Hub's current list."""
    table = Table("phone", "chip", "part", "HTP", "soc_model", "hosted", "profiled on")
    for row in rows:
        table.add_row(
            row["phone"],
            row["chipset"],
            ", ".join(row["sm"]).upper(),
            row["htp"] or "-",
            "-" if row["soc_model"] is None else str(row["soc_model"]),
            "yes" if row["hosted"] else "no",
            row["profiled_on"] or "-",
        )
    source = "AI Hub's current list" if live else "built-in table; --hub asks AI Hub for its current list"
    return Group(table, f"hosted: {source}")


# ---- look ----


def render_inspection(report: dict[str, Any]) -> RenderableType:
    """Lay out the result of `inspect`."""
    structure, blocks = report["structure"], report["temporal_blocks"]
    facts = Table(title=f"{report['name']} ({report['kind']})", show_header=False, title_justify="left")
    facts.add_row("clip", f"{structure['frames']} frames, {structure['width']}x{structure['height']} px")
    facts.add_row("UNet parameters", f"{report['parameters']:,} in training form")
    facts.add_row(
        "", f"{report['parameters_rewritten']:,} after {', '.join(report['rewrites']) or 'no rewrite'}"
    )
    facts.add_row("UNet operations", f"{_flops(report['tflops'])} for one evaluation, after these rewrites")
    facts.add_row("", f"{_flops(report['tflops_paper_convention'])} as the paper counts")
    facts.add_row("temporal multiscaling", structure["temporal_multiscaling"])
    facts.add_row("temporal blocks", f"{blocks['kept']} of {blocks['total']} kept")
    for place, r in report["funnels"].items():
        facts.add_row(f"funnels, {place.replace('_', ' ')}", "none" if r == 1 else f"r = {r:g}")
    for name, parameters in report["components"].items():
        facts.add_row(f"{name} parameters", f"{parameters:,}")

    levels = Table(title="levels", title_justify="left")
    for column in ("level", "channels", "heads", "latent h x w", "frames"):
        levels.add_column(column, justify="right")
    for level in structure["levels"]:
        size = " x ".join(map(str, level["latent"]))
        values = (level["level"], level["channels"], level["heads"] or "-", size, level["frames"])
        levels.add_row(*map(str, values))

    temporal = Table(title="temporal blocks", title_justify="left")
    for column in ("block", "kind"):
        temporal.add_column(column)
    for column in ("level", "GFLOPs if kept", "importance"):
        temporal.add_column(column, justify="right")
    temporal.add_column("kept")
    for block in blocks["blocks"]:
        importance = "-" if block["importance"] is None else f"{block['importance']:.3f}"
        cost = f"{1e3 * block['tflops']:.3g}"
        kept = "kept" if block["kept"] else "dropped"
        temporal.add_row(block["path"], block["kind"], str(block["level"]), cost, importance, kept)
    return Group(facts, levels, temporal)


def render_ladder(rows: list[dict[str, Any]]) -> RenderableType:
    """Lay out the rows of `ladder`, with their notes."""
    from mobilevd_deploy.inspection import LADDER_NOTES  # imports torch, like the counting itself

    table = Table(title="published ladder and ours: TFLOPs of one evaluation", title_justify="left")
    table.add_column("preset")
    table.add_column("row of the paper")
    for column in (
        "published",
        "ours",
        "",
        "ours, paper's way",
        "",
        "NFE",
        "FVD 25 / 7 fps",
        "GPU ms",
        "phone ms",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["preset"],
            row["title"],
            f"{row['published_tflops']:.2f}",
            f"{row['tflops']:.3f}",
            f"{row['deviation']:+.1%}",
            f"{row['tflops_paper_convention']:.3f}",
            f"{row['deviation_paper_convention']:+.2%}",
            str(row["nfe"]),
            " / ".join(map(str, row["fvd"])),
            f"{row['gpu_ms']:g}",
            "-" if row["phone_ms"] is None else f"{row['phone_ms']:g}",
        )
    return Group(table, "NFE, FVD, GPU and phone milliseconds are the paper's.", *LADDER_NOTES)


def render_diff(rows: Iterable[DiffRow], a: str, b: str) -> Table:
    """Lay out quantities of the artifacts `a` and `b`."""
    table = Table("component", "quantity", a, b, "change", title_justify="left")
    for row in rows:
        sides = (_figure(row.a, row.a_error_percent), _figure(row.b, row.b_error_percent))
        table.add_row(row.component or "whole", row.quantity, *sides, _change(row.a, row.b))
    return table


def finding_line(finding: DoctorFinding) -> str:
    """Describe a finding of `doctor`, with its remedy."""
    mark = "ok     " if finding.ready else "MISSING" if finding.needed else "not yet"
    remedy = f" -> {finding.remedy}" if finding.remedy else ""
    return f"{mark} {finding.what}: {finding.detail}{remedy}"


# ---- figures ----


def _bar(value: float, longest: float) -> str:
    return "█" * max(1, round(_BAR * value / longest)) if longest else ""


def _figure(value: float | None, error_percent: float | None = None) -> str:
    if value is None or value == math.inf:
        return "-" if value is None else "identical"
    spread = "" if error_percent is None else f" ± {error_percent:.0f} %"
    return (f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}") + spread


def _change(a: float | None, b: float | None) -> str:
    return f"{b / a - 1:+.1%}" if a and b and a < math.inf and b < math.inf else ""


def _flops(tflops: float) -> str:
    return f"{tflops:.3f} TFLOPs" if tflops >= 0.1 else f"{1e3 * tflops:.3f} GFLOPs"


def _sqnr(check: OutputCheck | None) -> str:
    return "-" if check is None else decibels(check.sqnr_db)
