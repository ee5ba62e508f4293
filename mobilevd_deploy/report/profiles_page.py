"""The page of an artifact's profiles and of its DRAM traffic: what was measured, estimated or planned."""

from __future__ import annotations

from collections.abc import Sequence

from mobilevd_deploy.profiling.profile import FIGURES, Profile, TrafficReport, total_words
from mobilevd_deploy.report.html import render


def render_profiles(name: str, profiles: Sequence[Profile], traffic: Sequence[TrafficReport] = ()) -> str:
    """Lay out profiles and planned DRAM traffic as one self-contained HTML page.

    Args:
        name: of the artifact.
        profiles: in the order of the page.
        traffic: in the order of the page, after the profiles.

    Returns:
        The page; equal inputs give equal text.
    """
    return render(
        "profiles.html",
        name=name,
        profiles=profiles,
        traffic=traffic,
        figure_names=FIGURES,
        total_words=total_words,
    )
