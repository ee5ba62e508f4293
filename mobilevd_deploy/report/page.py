"""The report of an export: one HTML page that a person reads first.

The page is self-contained: no script, no font, no network, and its content security policy forbids them. It
follows the reader's light or dark setting and fits a phone. `templates/report.html` lists the sections in
reading order.
"""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from mobilevd_deploy.artifact.manifest import Manifest
from mobilevd_deploy.config.recipe import GraphForms, Recipe
from mobilevd_deploy.config.spec import ModelSpec
from mobilevd_deploy.config.strict import from_dict
from mobilevd_deploy.report.html import decibels, plural, render
from mobilevd_deploy.report.temporal_map import DROP_PASS, temporal_map


def render_report(manifest: Manifest, importance: Mapping[str, float], sheet: bytes | None = None) -> str:
    """Lay out a manifest as one self-contained HTML page.

    Args:
        manifest: of the artifact; its `files` are not read, since the report is one of them.
        importance: temporal block path -> importance that training recorded in the checkpoint; empty
            if the network has no gates.
        sheet: a PNG with the input and the clips of the float and the quantised networks.

    Returns:
        The page; equal inputs give equal text.

    Raises:
        SpecError: `manifest.model` or `manifest.recipe` is not a resolved spec or recipe.
    """
    recipe = from_dict(Recipe, manifest.recipe)
    spec = from_dict(ModelSpec, manifest.model)
    sqnr = _last_sqnr(manifest)
    return render(
        "report.html",
        manifest=manifest,
        recipe=recipe,
        sheet=None if sheet is None else base64.b64encode(sheet).decode("ascii"),
        # Stages with ": " in their name are steps of another stage, whose time includes theirs.
        export_seconds=sum(cost.seconds for name, cost in manifest.stages.items() if ": " not in name),
        sqnr=sqnr,
        worst=_worst(sqnr),
        binaries=[(c, binary) for c in manifest.components for binary in c.npu],
        drift=_drift_by_stage(manifest),
        noise=_noise(manifest),
        waterfall=_waterfall(manifest),
        temporal=temporal_map(spec, importance),
        drop_pass=None if DROP_PASS in {report.name for report in manifest.passes} else DROP_PASS,
        forms=graph_form_words(recipe.graph),
        command=_command(manifest),
    )


def _last_sqnr(manifest: Manifest) -> dict[str, float]:
    """Return each measured component's SQNR in dB after the last stage that measured it; inf: identical."""
    last: dict[str, float] = {}
    for stage in manifest.drift.values():
        last |= {name: math.inf if value is None else value for name, value in stage.items()}
    return {c.name: last[c.name] for c in manifest.components if c.name in last}


def _worst(sqnr: Mapping[str, float]) -> tuple[str, str]:
    """Return the lowest SQNR and the component that has it, in words."""
    if not sqnr:
        return "-", "not measured"
    name = min(sqnr, key=sqnr.__getitem__)
    return decibels(sqnr[name]), "all components" if sqnr[name] == math.inf else name


def _drift_by_stage(manifest: Manifest) -> dict[str, dict[str, float | None]]:
    """Return the drift by stage, as the table names stages; the rewrites are the first stage."""
    rewritten = {"rewritten": {"unet": manifest.passes[-1].sqnr_db}} if manifest.passes else {}
    stages = {name.replace("npu.", "simulated "): values for name, values in manifest.drift.items()}
    return rewritten | stages


@dataclass(frozen=True)
class _BlockNoise:
    """Noise of one block alone: its part of the noise of all blocks, and the output's SQNR in dB."""

    block: str
    share: float
    sqnr_db: float | None


def _noise(manifest: Manifest) -> dict[str, list[_BlockNoise]]:
    """Return the blocks of each component whose sensitivity was measured, most noise first."""
    noise = {}
    for name, blocks in (manifest.quality.sensitivity if manifest.quality else {}).items():
        powers = {block: 0.0 if db is None else 10 ** (-db / 10) for block, db in blocks.items()}
        if whole := sum(powers.values()):
            rows = [_BlockNoise(block, power / whole, blocks[block]) for block, power in powers.items()]
            noise[name] = sorted(rows, key=lambda row: -row.share)
    return noise


@dataclass(frozen=True)
class _Step:
    """A row of the waterfall of rewrites: counts before and after it."""

    name: str
    facts: str
    parameters: tuple[int, int]
    flops: tuple[int, int]


def _waterfall(manifest: Manifest) -> list[_Step]:
    """Return the trained UNet, one step per rewrite, and all rewrites together; empty without rewrites."""
    passes = manifest.passes
    if not passes:
        return []
    first, last = passes[0], passes[-1]
    params, flops = first.params_before, first.flops_before
    return [
        _Step("trained UNet", "before any rewrite", (params, params), (flops, flops)),
        *(
            _Step(
                p.name,
                f"{plural(len(p.changed), 'module')} changed, {decibels(p.sqnr_db)}",
                (p.params_before, p.params_after),
                (p.flops_before, p.flops_after),
            )
            for p in passes
        ),
        _Step(
            "rewritten UNet",
            plural(len(passes), "rewrite"),
            (params, last.params_after),
            (flops, last.flops_after),
        ),
    ]


_FORMS: dict[str, dict[str, str]] = {
    "attention": {
        "whole": "one score map for all heads",
        "tiles": "score maps of {query_tile} query positions at a time",
        "heads": "one head at a time, {query_tile} query positions at a time",
    },
    "frames": {"batch": "all at once, as the batch axis", "sequential": "one after the other"},
    "linear": {"matmul": "matrix products", "conv": "1\N{MULTIPLICATION SIGN}1 convolutions"},
    "group_norm": {
        "group": "group norm operator",
        "instance": "instance norm over the reshaped map, then scale and shift per channel",
    },
    "upsample": {
        "nearest": "nearest neighbour, then a 3\N{MULTIPLICATION SIGN}3 convolution",
        "subpixel": "four 2\N{MULTIPLICATION SIGN}2 convolutions on the small map, interleaved",
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
    "temporal_conv": "Temporal convolutions",
}


def graph_form_words(forms: GraphForms) -> dict[str, str]:
    """Describe the graph forms of a recipe: part of the network -> its form in words."""
    words = {
        _FORM_NAMES[name]: choices[getattr(forms, name)].format(query_tile=forms.query_tile)
        for name, choices in _FORMS.items()
    }
    if forms.attention != "whole" and forms.whole_up_to:
        words["Attention"] += f"; whole on maps of up to {forms.whole_up_to} tokens"
    return words


def _command(manifest: Manifest) -> str:
    # "./" keeps a name that starts with a dash from being read as an option.
    name = manifest.name if not manifest.name.startswith("-") else f"./{manifest.name}"
    return f"mobilevd-deploy generate PICTURE --artifact {shlex.quote(name)} -o clip.gif"
