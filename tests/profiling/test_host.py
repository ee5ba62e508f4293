from __future__ import annotations

import numpy as np
import pytest

from mobilevd_deploy.errors import ArtifactError
from mobilevd_deploy.profiling.host import profile_on_host
from mobilevd_deploy.profiling.store import load_profile, save_profile
from mobilevd_deploy.runtime.pipeline import Pipeline
from mobilevd_deploy.runtime.recording import check_picture, run_on_host
from tests.support.tiny_artifact import write_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_artifact(tmp_path_factory.mktemp("host") / "tiny")


def test_every_component_is_timed_as_often_as_asked(artifact, tmp_path):
    profile = profile_on_host(artifact, samples=4)
    assert [(row.name, row.ms.samples) for row in profile.components] == [
        (component.name, 4) for component in artifact.manifest.components
    ]
    assert all(row.ms.median > 0 and row.first_load_ms > 0 for row in profile.components)
    assert profile.source == "host"
    assert profile.manifest_sha256 == artifact.digest
    assert load_profile(save_profile(profile, tmp_path)) == profile


def test_time_ends_it_early_but_not_before_two_calls(artifact):
    profile = profile_on_host(artifact, samples=1000, seconds=1e-9)
    assert {row.ms.samples for row in profile.components} == {2}


def test_only_some(artifact):
    profile = profile_on_host(artifact, components=("unet",), samples=2)
    assert [row.name for row in profile.components] == ["unet"]
    with pytest.raises(ArtifactError, match="no component 'x'"):
        profile_on_host(artifact, components=("x",))


def test_what_is_recorded_is_what_a_clip_is_made_of(artifact):
    taken = run_on_host(artifact, None)
    frames = Pipeline.open(artifact).generate(check_picture(artifact, None), 0)
    assert np.array_equal(taken["decoder"][1], frames)
    assert np.array_equal(taken["unet"][0]["image_latents"], taken["vae_encoder"][1])
