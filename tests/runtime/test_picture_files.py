from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilevd_deploy.errors import MediaError
from mobilevd_deploy.runtime import media
from mobilevd_deploy.runtime.picture_files import describe_skipped, find_pictures

Make = Callable[[Path], object]


def photos(folder: Path, ending: str = "jpg", count: int = 3) -> list[str]:
    """Files of different content; finding them reads nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"IMG_{i}.{ending}" for i in range(count)]
    for name in names:
        (folder / name).write_text(name)
    return names


def beside(folder: Path, name: str, text: str = "x") -> None:
    photos(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def mac(folder: Path) -> None:
    for name in photos(folder):
        (folder / ".DS_Store").write_text("x")
        (folder / f"._{name}").write_text("AppleDouble")


def synology(folder: Path) -> None:
    for name in photos(folder):
        beside(folder / "@eaDir" / name, "SYNOFILE_THUMB_M.jpg")


def links_to_files(folder: Path) -> None:
    photos(folder.parent / "elsewhere")
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").symlink_to(f"../elsewhere/IMG_{i}.jpg")


def linked_folder(folder: Path) -> None:
    photos(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


def link_inside(folder: Path) -> None:
    photos(folder.parent / "elsewhere")
    folder.mkdir()
    (folder / "more").symlink_to("../elsewhere")
    (folder / "once more").symlink_to("../elsewhere")


def loop(folder: Path) -> None:
    photos(folder)
    (folder / "self").symlink_to(".")
    photos(folder / "deep", count=0)
    (folder / "deep" / "up").symlink_to("..")


def dangling(folder: Path) -> None:
    photos(folder)
    (folder / "IMG_9.jpg").symlink_to("../nowhere.jpg")


def two_names(folder: Path) -> None:
    photos(folder)
    os.link(folder / "IMG_0.jpg", folder / "hard.jpg")
    (folder / "soft.jpg").symlink_to("IMG_1.jpg")


def pipe(folder: Path) -> None:
    photos(folder)
    os.mkfifo(folder / "camera.jpg")


def latin1(folder: Path) -> None:
    photos(folder, count=2)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_text("x")


def nested(folder: Path) -> None:
    for i in range(3):
        photos(folder / f"class_{i}", count=1)
        (folder / f"class_{i}" / "IMG_0.jpg").write_text(f"{i}")


def heic(folder: Path) -> None:
    photos(folder)
    photos(folder, "HEIC", 40)


ENDINGS = ("JPG", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "jp2", "MOV", "mp4")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (photos, ""),
        (mac, "; skipped 4 hidden"),
        (lambda f: beside(f, "__MACOSX/._IMG_0.jpg"), "; skipped 1 hidden"),
        (synology, "; skipped 1 hidden"),
        (lambda f: beside(f, ".ipynb_checkpoints/IMG_0-checkpoint.jpg"), "; skipped 1 hidden"),
        (lambda f: beside(f, "$RECYCLE.BIN/IMG_7.jpg"), "; skipped 1 hidden"),
        (lambda f: beside(f, "Thumbs.db"), "; skipped 1 .db"),
        (lambda f: beside(f, "IMG_0.txt"), "; skipped 1 .txt"),
        (lambda f: beside(f, "LICENSE"), "; skipped 1 without an ending"),
        (heic, "; skipped 40 .heic (install mobilevd-deploy[heif])"),
        (links_to_files, ""),
        (linked_folder, ""),
        (link_inside, ""),
        (loop, ""),
        (dangling, "; skipped 1 broken link"),
        (two_names, "; skipped 2 duplicates"),
        (pipe, "; skipped 1 special file"),
        (latin1, ""),
        (nested, ""),
        *[(lambda f, ending=ending: photos(f, ending), "") for ending in ENDINGS],
    ],
)
def test_three_pictures_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, said: str
) -> None:
    if make is heic:
        monkeypatch.setattr("mobilevd_deploy.runtime.picture_files.picture_suffixes", lambda: {".jpg"})
    make(tmp_path / "here")
    found = find_pictures([tmp_path / "here"])
    assert len(found.files) == 3
    assert all(path.is_file() for path in found.files)
    assert describe_skipped(found.skipped) == said


def test_avif_and_heic_count_where_they_can_be_read(tmp_path: Path) -> None:
    from PIL import features

    suffixes = media.picture_suffixes()
    assert (".avif" in suffixes) == features.check("avif")
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        assert not media.HEIF_SUFFIXES & suffixes
    else:
        assert suffixes >= media.HEIF_SUFFIXES
    # Pillow recognises these and cannot decode them.
    assert not {".eps", ".h5", ".grib", ".mpg", ".wmf"} & suffixes


def test_files_that_are_named_are_taken_as_they_are(tmp_path: Path) -> None:
    photos(tmp_path / ".hidden")
    (tmp_path / "notes.txt").write_text("x")
    paths = [tmp_path / ".hidden", tmp_path / "notes.txt", tmp_path / "absent.png"]
    found = find_pictures(paths)
    assert [path.name for path in found.files] == [*photos(tmp_path), "notes.txt", "absent.png"]
    assert not found.skipped


def test_the_order_is_that_of_the_names(tmp_path: Path) -> None:
    for name in ("b/1.png", "a.png", "c.png", "b/0.png"):
        beside(tmp_path / "x", name, name)
    found = find_pictures([tmp_path / "x"])
    assert [*found.files] == sorted(found.files)


def test_folders_that_overlap_give_each_file_once(tmp_path: Path) -> None:
    photos(tmp_path / "x" / "y")
    assert len(find_pictures([tmp_path / "x", tmp_path / "x" / "y"]).files) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    photos(tmp_path / "x")
    (tmp_path / "x").chmod(0)
    try:
        with pytest.raises(MediaError, match="x cannot be read: Permission denied"):
            find_pictures([tmp_path / "x"])
    finally:
        (tmp_path / "x").chmod(0o755)


def test_what_was_skipped_fits_one_line() -> None:
    skipped = {"duplicates": 2, "hidden": 3, ".heic": 12, ".txt": 90, ".json": 1, ".md": 5, "broken links": 1}
    assert describe_skipped(skipped) == (
        "; skipped 12 .heic (install mobilevd-deploy[heif]), 3 hidden, 2 duplicates, 1 broken link, 96 more"
    )
    assert describe_skipped({}) == ""
