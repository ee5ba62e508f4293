from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevd_deploy.errors import MediaError, UsageError
from mobilevd_deploy.quantize.calibration import JUDGES, Pictures, drawn_pictures, read_pictures
from mobilevd_deploy.runtime.media import write_clip
from mobilevd_deploy.synthetic.clips import HELD_OUT, make_clip


def test_drawn_pictures_depend_on_the_seed_alone_and_are_not_held_out() -> None:
    pictures = drawn_pictures(128, 64, 3, seed=0)
    assert len(pictures.values) == 3 + JUDGES
    assert {value.shape for value in pictures.values} == {(1, 3, 64, 128)}
    assert all(value.dtype == np.float32 and np.abs(value).max() <= 1 for value in pictures.values)
    assert pictures.sha256 == drawn_pictures(128, 64, 3, seed=0).sha256
    assert len(set(pictures.sha256)) == 3 + JUDGES
    assert not set(pictures.sha256) & set(drawn_pictures(128, 64, 3, seed=1).sha256)
    held_out = make_clip(0, HELD_OUT).frames[0].transpose(2, 0, 1)[None] / 127.5 - 1
    assert all(np.abs(value - held_out).max() > 0.1 for value in pictures.values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        Image.new("RGB", (40, 30), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


def test_pictures_of_a_folder_are_chosen_by_the_seed(folder: Path) -> None:
    some = read_pictures([folder], 16, 8, samples=2, seed=0)
    assert len(some.values) == 2 + JUDGES
    assert some.values[0].shape == (1, 3, 8, 16)
    assert some.sha256 == read_pictures([folder], 16, 8, samples=2, seed=0).sha256
    assert some.sha256 != read_pictures([folder], 16, 8, samples=2, seed=1).sha256
    assert some.source == "4 of 6 pictures"


def test_fewer_pictures_than_asked_are_all_taken(folder: Path) -> None:
    everything = read_pictures([folder / f"{i}.png" for i in range(3)], 16, 8, samples=8, seed=0)
    assert len(everything.values) == 3


def read_copies(folder: Path, count: int) -> Pictures:
    paths = [folder / f"{i % 6}.png" for i in range(count + JUDGES)]
    return read_pictures(paths, 128, 64, samples=count, seed=0)


@pytest.mark.parametrize("kind", ["drawn", "read"])
def test_memory_does_not_grow_with_the_samples(kind: str, folder: Path) -> None:
    def peak(samples: int) -> int:
        tracemalloc.start()
        pictures = (
            drawn_pictures(128, 64, samples, seed=0) if kind == "drawn" else read_copies(folder, samples)
        )
        assert sum(1 for _ in pictures.values) == samples + JUDGES
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(1)  # whatever is imported or cached at the first time
    picture = 3 * 128 * 64 * 4
    assert peak(10) < peak(2) + picture


@pytest.mark.parametrize("make", [lambda _: drawn_pictures(128, 64, 4, 0), lambda f: read_copies(f, 4)])
def test_pictures_reach_another_process(make: Callable[[Path], Pictures], folder: Path) -> None:
    pictures = make(folder)
    received = pickle.loads(pickle.dumps(pictures))
    assert received.sha256 == pictures.sha256
    for ours, theirs in zip(pictures.values[1:3], received.values[1:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_clips_count_by_their_first_frame(tmp_path: Path) -> None:
    for i in range(3):
        clip = np.full((4, 3, 32, 48), -1, np.float32)
        clip[0] = i / 2
        write_clip(clip, tmp_path / f"{i}.mp4", fps=7)
    pictures = read_pictures([tmp_path], 48, 32, samples=8, seed=0)
    assert pictures.source == "3 of 3 pictures"
    assert sorted(round(float(value.mean()), 1) for value in pictures.values) == [0.0, 0.5, 1.0]


def test_a_clip_that_is_none_is_named(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_bytes(b"not a clip")
    with pytest.raises(MediaError, match=r"\d\.mp4 is not a clip") as caught:
        read_pictures([tmp_path], 16, 8, samples=2, seed=0)
    assert "ffmpeg" in str(caught.value.next_step)


def test_too_few_or_no_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="2 calibration pictures are too few"):
        read_pictures([folder / "0.png", folder / "1.png"], 16, 8, samples=8, seed=0)
    with pytest.raises(MediaError, match=r"notes\.txt"):
        read_pictures([*folder.glob("[01].png"), folder / "notes.txt"], 16, 8, samples=8, seed=0)
