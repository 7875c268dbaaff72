"""Files and folders are whole or absent."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from elit import ElitError
from elit.atomic import atomic_file, atomic_folder

Atomic = Callable[[Path], AbstractContextManager[Path]]


def fill(place: Path, text: str) -> None:
    """Writes into a file, or into two files of a folder."""
    if place.is_dir():
        (place / "inner").mkdir()
        (place / "a.txt").write_text(text)
        (place / "inner" / "b.txt").write_text(text)
    else:
        place.write_text(text)


def listing(folder: Path) -> list[str]:
    """Names in a folder, the hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


both = pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])


@both
def test_it_appears_when_the_block_ends(atomic: Atomic, tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "thing.txt"
    with atomic(target) as place:
        assert place.parent == target.parent  # one file system, so that the rename is one step
        fill(place, "whole")
        assert not target.exists()
    assert listing(target.parent) == ["thing.txt"]
    written = target if target.is_file() else target / "inner" / "b.txt"
    assert written.read_text() == "whole"


@both
@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), ElitError("mine")])
def test_a_failing_block_leaves_nothing(atomic: Atomic, error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, atomic(tmp_path / "thing") as place:
        fill(place, "half")
        raise error
    assert caught.value is error
    assert listing(tmp_path) == []


@both
def test_a_full_disk_is_one_sentence_and_leaves_nothing(atomic: Atomic, tmp_path: Path) -> None:
    with pytest.raises(ElitError, match=r"^cannot write .*thing: No space left on device$"), atomic(tmp_path / "thing"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert listing(tmp_path) == []


@both
@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("timed out"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "s3://bucket/gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_network_are_not_told_as_errors_of_the_disk(
    atomic: Atomic, error: OSError, tmp_path: Path
) -> None:
    with pytest.raises(type(error)) as caught, atomic(tmp_path / "thing") as place:
        fill(place, "half")
        raise error
    assert caught.value is error
    assert listing(tmp_path) == []


@both
def test_what_the_block_cannot_write_is_told(atomic: Atomic, tmp_path: Path) -> None:
    with (
        pytest.raises(ElitError, match=r"^cannot write .*thing: Not a directory$"),
        atomic(tmp_path / "thing") as place,
    ):
        fill(place, "half")
        (place / "a.txt" if place.is_dir() else place).joinpath("below").write_text("")
    assert listing(tmp_path) == []


def test_the_mask_of_the_process_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of all threads: files that they create meanwhile would have its rights."""
    monkeypatch.setattr("os.umask", lambda mask: pytest.fail("the mask was changed"))
    with atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder"):
        pass
    assert listing(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize(
    ("atomic", "owner", "call"),
    [(atomic_file, os, "fsync"), (atomic_folder, os, "fsync"), (atomic_file, Path, "replace"),
     (atomic_folder, Path, "rename")],
)  # fmt: skip
def test_a_failing_call_of_the_system_leaves_nothing(
    atomic: Atomic, owner: object, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(ElitError, match=r"cannot write .*: Input/output error"), atomic(tmp_path / "thing") as place:
        fill(place, "half")
    assert listing(tmp_path) == []


@both
def test_a_place_that_cannot_be_is_named(atomic: Atomic, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "below"
    with pytest.raises(ElitError, match=r"^cannot write .*file/below: "), atomic(target):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "in the way"


@both
def test_a_folder_without_the_right_to_write_is_named(
    atomic: Atomic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object, **__: object) -> None:  # root may write everywhere, so the system's answer is staged
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.open", deny)
    monkeypatch.setattr("os.mkdir", deny)
    with pytest.raises(ElitError, match=r"cannot write .*thing: Permission denied"), atomic(tmp_path / "thing"):
        pytest.fail("the block must not run")
    assert listing(tmp_path) == []


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as place:
        place.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_file(target) as place:
        place.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert listing(tmp_path) == ["thing"]


@pytest.mark.parametrize("content", [[], ["kept"]], ids=["empty", "full"])
def test_an_existing_folder_is_an_error_and_stays(content: list[str], tmp_path: Path) -> None:
    target = tmp_path / "thing"
    target.mkdir()
    for name in content:
        (target / name).write_text("mine")
    with pytest.raises(ElitError, match="thing exists already"), atomic_folder(target) as place:
        fill(place, "new")
    assert listing(target) == content
    assert listing(tmp_path) == ["thing"]


def test_an_existing_folder_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    with pytest.raises(ElitError, match="thing exists already"), atomic_folder(tmp_path / "thing"):
        pytest.fail("the block must not run")


def test_a_folder_that_appears_meanwhile_is_an_error_and_stays(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with pytest.raises(ElitError, match="thing exists already"), atomic_folder(target) as place:
        fill(place, "new")
        target.mkdir()
        (target / "theirs").touch()
    assert listing(target) == ["theirs"]
    assert listing(tmp_path) == ["thing"]


def test_what_is_written_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    """Temporary files are private by default; what takes the final name must not be."""
    mask = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "file") as place:
            place.write_text("")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_the_temporary_file_keeps_the_suffix(tmp_path: Path) -> None:
    """Writers such as image libraries choose the format by it."""
    with atomic_file(tmp_path / "image.png") as place:
        assert place.suffix == ".png"


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with atomic_folder(target, replace=True) as place:  # there is none yet
        (place / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True) as place:
        (place / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    with atomic_folder(target, replace=True) as place:
        (place / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
