from __future__ import annotations

import hashlib
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mobilevd_deploy.base.progress import Progress
from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.recipe import load_recipe
from mobilevd_deploy.errors import MediaError, UsageError
from mobilevd_deploy.quantize import calibration
from mobilevd_deploy.quantize.calibration import (
    JUDGES,
    Pictures,
    choose_pictures,
    drawn_pictures,
    read_pictures,
)
from mobilevd_deploy.runtime.media import read_picture, write_clip
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
    paths = [folder / f"wide{i}.png" for i in range(count + JUDGES)]
    for i, path in enumerate(paths):
        Image.new("RGB", (40, 30), (0, i * 10, 0)).save(path)
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


def noisy(folder: Path, count: int, ending: str = "png") -> list[Path]:
    """Pictures that look different."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"IMG_{i}.{ending}" for i in range(count)]
    for i, path in enumerate(paths):
        values = np.random.default_rng(i).integers(0, 255, (6, 12, 3), dtype=np.uint8)
        Image.fromarray(values).resize((64, 32)).save(path)
    return paths


def test_copies_neither_calibrate_twice_nor_judge(tmp_path: Path) -> None:
    """Copies in other file formats, whose bytes differ and whose pixels do not."""
    for i, path in enumerate(noisy(tmp_path / "x", 4)):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
            image.save(tmp_path / "x" / f"lossless {i}.webp", lossless=True)
    for seed in range(10):
        pictures = read_pictures([tmp_path / "x"], 64, 32, samples=8, seed=seed)
        assert len(pictures.values) == len(set(pictures.sha256)) == 4
        assert pictures.summary == "calibration: 4 of 12 pictures used; skipped 8 duplicates"
        assert [*pictures.sha256] == [
            hashlib.sha256(value.tobytes()).hexdigest() for value in pictures.values
        ]


@pytest.mark.parametrize(
    ("different", "copies", "error"),
    [
        (0, 0, "0 calibration pictures are too few: at least 3 different ones are needed, "
               "1 to calibrate and 2 to judge"),
        (1, 11, "1 calibration picture is too few: at least 3 different ones are needed, "
                "1 to calibrate and 2 to judge; skipped 11 duplicates"),
        (2, 2, "2 calibration pictures are too few: at least 3 different ones are needed, "
               "1 to calibrate and 2 to judge; skipped 2 duplicates"),
    ],
)  # fmt: skip
def test_too_few_different_pictures(tmp_path: Path, different: int, copies: int, error: str) -> None:
    paths = noisy(tmp_path, different)
    for i in range(copies):
        shutil.copy(paths[i % different], tmp_path / f"copy_{i}.png")
    with pytest.raises(UsageError) as caught:
        read_pictures([tmp_path], 64, 32, samples=8, seed=0)
    assert caught.value.what == error
    assert caught.value.next_step is not None
    assert "can use 10" in caught.value.next_step


@pytest.mark.parametrize("ending", ["jpg", "JPG", "jfif", "webp", "tif", "avif"])
def test_the_usual_folders_calibrate(tmp_path: Path, ending: str) -> None:
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    noisy(tmp_path / "photos" / "2024", 5, ending)
    (tmp_path / "photos" / "._IMG_0.jpg").write_bytes(b"\0\x05\x16\x07")
    (tmp_path / "photos" / "labels.txt").write_text("0")
    pictures = read_pictures([tmp_path / "photos"], 64, 32, samples=2, seed=0)
    assert pictures.summary == "calibration: 4 of 5 pictures used; skipped 1 hidden, 1 .txt"


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"", "is empty"), (b"\xff\xd8\xff\xe0 cut", r"IMG_1\.png is (not an image|damaged)")],
)
def test_a_damaged_picture_is_named(tmp_path: Path, content: bytes, error: str) -> None:
    noisy(tmp_path, 4)[1].write_bytes(content)
    with pytest.raises(MediaError, match=error):
        read_pictures([tmp_path], 64, 32, samples=8, seed=0)


def test_only_as_many_files_are_read_as_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy(tmp_path, 30)
    read = []
    monkeypatch.setattr(
        calibration, "read_picture", lambda path, *size: read.append(path) or read_picture(path, *size)
    )
    read_pictures([tmp_path], 64, 32, samples=3, seed=0)
    assert len(read) == 5


def test_ignored_profiles_are_counted(tmp_path: Path) -> None:
    for path in noisy(tmp_path, 4)[:2]:
        with Image.open(path) as image:
            image.load()
        image.save(path, icc_profile=b"no profile")
    pictures = read_pictures([tmp_path], 64, 32, samples=2, seed=0)
    assert pictures.summary == (
        "calibration: 4 of 4 pictures used; 2 with a colour profile that cannot be used count as sRGB"
    )


class Heard(Progress):
    def __init__(self) -> None:
        self.events: list[str] = []

    def begin(self, stage: str) -> None:
        self.events.append(f"begin {stage}")

    def end(self, *, reused: bool = False) -> None:
        self.events.append("end")

    def say(self, sentence: str) -> None:
        self.events.append(sentence)


def test_the_reading_of_folders_is_shown_and_summed_up(folder: Path) -> None:
    spec, recipe = load_preset("demo").model, load_recipe("xiaomi-14-pro")
    heard = Heard()
    choose_pictures(spec, recipe, [folder], heard)
    assert heard.events == [
        "begin read pictures",
        "end",
        "calibration: 6 of 6 pictures used; skipped 1 .txt",
    ]
    heard = Heard()
    assert choose_pictures(spec, recipe, [], heard) is not None
    assert heard.events == []
