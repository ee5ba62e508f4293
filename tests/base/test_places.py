"""Places to write to, checked before the work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mobilevd_deploy.base import places
from mobilevd_deploy.base.files import disk_guard, written_aside
from mobilevd_deploy.base.places import (
    require_distinct,
    require_file_place,
    require_folder_place,
    require_scratch,
)
from mobilevd_deploy.errors import ResourceError, UsageError

# Nobody can create a file there, whatever the user's rights.
READ_ONLY = Path("/proc")


@pytest.mark.parametrize("check", [require_file_place, require_folder_place])
def test_a_place_that_can_be_written_stays_as_it_is(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path / "x.gif")
    check(tmp_path / "new" / "deep" / "x.gif")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [require_file_place, require_folder_place])
@pytest.mark.parametrize("place", ["x.gif", "new/x.gif"])
def test_a_read_only_place_is_refused(check: Callable[[Path], None], place: str) -> None:
    with pytest.raises(UsageError, match=f"/proc/{place} cannot be written: /proc: ") as caught:
        check(READ_ONLY / place)
    assert caught.value.next_step == "choose another output"


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    for check in (require_file_place, require_folder_place):
        with pytest.raises(UsageError, match="Not a directory"):
            check(tmp_path / "photo.jpg" / "x.gif")
    with pytest.raises(UsageError, match="is a folder"):
        require_file_place(tmp_path)


@pytest.mark.parametrize("check", [require_file_place, require_folder_place, lambda p, n: require_scratch(n)])
def test_a_disk_without_room(
    check: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=999))
    check(tmp_path / "x", 999)
    with pytest.raises(ResourceError, match="about 1,000 bytes are needed, 999 bytes are free"):
        check(tmp_path / "x", 1000)


@pytest.mark.parametrize("tmpdir", ["/proc", "/proc/none", "/etc/hostname"])
def test_a_temporary_folder_that_cannot_be_used_is_named(
    tmpdir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", tmpdir)
    with pytest.raises(UsageError, match=f"the temporary folder {tmpdir} cannot be written: ") as caught:
        require_scratch()
    assert "set TMPDIR" in str(caught.value.next_step)


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for writing although the table says that bytes are free (a quota)."""

    def full(**_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ResourceError, match=f"temporary folder {tmp_path}: the disk is full") as caught:
        require_scratch()
    assert caught.value.next_step == places._SET_TMPDIR


def test_a_disk_that_fills_up_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's own file decides; without one, the fuller of the output's and the temporary disk."""
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    output.mkdir()
    scratch.mkdir()
    usage = shutil.disk_usage(tmp_path)
    free = {output: 10**12, scratch: 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[Path(path)]))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(scratch))
    for error, named in (
        (OSError(errno.ENOSPC, "full"), scratch),
        (OSError(errno.ENOSPC, "full", str(output / "x")), output),
        (OSError(errno.ENOSPC, "full", str(scratch / "gone" / "x")), scratch),
    ):
        with pytest.raises(ResourceError) as caught, disk_guard(output, 0):
            raise error
        assert caught.value.what.startswith(f"{named}: the disk is full")
    free[scratch] = 10**12 + 1
    with pytest.raises(ResourceError, match=f"^{output}: "), written_aside(output / "x"):
        raise OSError(errno.ENOSPC, "full")


def link(kind: str, a: Path, b: Path) -> None:
    a.symlink_to(b) if kind == "symbolic" else a.hardlink_to(b)


def test_an_output_that_is_an_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "p.png"
    photo.touch()
    link("symbolic", tmp_path / "soft.png", photo)
    link("hard", tmp_path / "hard.png", photo)
    for spelling in (
        "p.png",
        "./p.png",
        "../" + tmp_path.name + "/p.png",
        "soft.png",
        "hard.png",
        str(photo),
    ):
        with pytest.raises(UsageError, match="is an input") as caught:
            require_distinct([Path("new.png"), Path(spelling)], [photo])
        assert caught.value.next_step == "choose another output"
    with pytest.raises(UsageError, match="is another output"):
        require_distinct([Path("new.png"), Path("./new.png")], [photo])
    with pytest.raises(UsageError, match="is an input"):
        require_distinct([Path("gone.png")], [tmp_path / "gone.png"])
    require_distinct([Path("a.png"), Path("b.png")], [photo])
