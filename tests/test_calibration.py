from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mobilevd_deploy.calibration import JUDGES, drawn_pictures, read_pictures
from mobilevd_deploy.errors import MediaError, UsageError
from mobilevd_deploy.training.clips import HELD_OUT, make_clip


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


def test_too_few_or_no_pictures_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="2 calibration pictures are too few"):
        read_pictures([folder / "0.png", folder / "1.png"], 16, 8, samples=8, seed=0)
    with pytest.raises(MediaError, match=r"notes\.txt"):
        read_pictures([*folder.glob("[01].png"), folder / "notes.txt"], 16, 8, samples=8, seed=0)
