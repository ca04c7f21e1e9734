"""The home folder of a stack: private, held by one process at a time, refused in one line where it cannot be used."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmaas.errors import SettingsError
from lmaas.process import private_files
from lmaas.up.home import LOCK, held


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("value", [0o000, 0o022, 0o077])
def test_a_new_home_is_private_whatever_the_umask(value: int, tmp_path: Path) -> None:
    home = tmp_path / "a" / "home"
    with umask(value), held(home):
        assert mode(home) == 0o700
        assert mode(home / LOCK) == 0o600


def test_a_process_of_ours_makes_private_files(tmp_path: Path) -> None:
    with umask(0):
        private_files()
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
    assert mode(tmp_path / "folder") == 0o700
    assert mode(tmp_path / "file") == 0o600


def test_a_home_of_an_earlier_release_becomes_private(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    with umask(0o022):
        (home / "objects" / "deep").mkdir(parents=True)
        outside.mkdir()
        for file in (home / LOCK, home / "objects" / "deep" / "model", home / "program", outside / "file"):
            file.touch()
        (home / "program").chmod(0o755)
        (home / "link").symlink_to(outside)
    with held(home) as tightened:
        assert tightened == 6
    assert [mode(home / name) for name in (".", "objects", "objects/deep")] == [0o700] * 3
    assert [mode(home / name) for name in (LOCK, "objects/deep/model", "program")] == [0o600, 0o600, 0o700]
    assert [mode(outside), mode(outside / "file")] == [0o755, 0o644], "a link is not followed"
    with held(home) as tightened:
        assert tightened == 0


def test_a_second_one_is_refused(tmp_path: Path) -> None:
    with held(tmp_path / "home"), pytest.raises(SettingsError, match="Another `lmaas up` runs in"), held(tmp_path / "home"):
        pass
    with held(tmp_path / "home"):
        pass


def test_an_error_of_the_block_is_not_taken_for_one_of_the_home(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), held(tmp_path / "home"):
        raise ConnectionError


def shared(tmp_path: Path) -> Path:
    """A folder that serves other purposes, such as /tmp."""
    tmp_path.chmod(0o755)
    (tmp_path / "of-others").touch()
    return tmp_path


def file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("home", "complaint"),
    [
        (shared, "holds files of others, and lmaas would make it private. Set LMAAS_HOME to a new or an empty folder."),
        (file, "is not a folder. Set LMAAS_HOME to one."),
        (lambda folder: file(folder) / "home", "cannot be used: Not a directory. Set LMAAS_HOME to a folder"),
        (lambda folder: folder / ("x" * 300), "cannot be used: File name too long. Set LMAAS_HOME to a folder"),
        (lambda folder: folder / "new\nline", "characters that cannot be printed"),
        (lambda folder: folder / os.fsdecode(b"\xff"), "characters that cannot be printed"),
    ],
)
def test_what_cannot_be_a_home_is_refused_in_one_line(home: Callable[[Path], Path], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=re.escape(complaint)) as refused, held(home(tmp_path)):
        pass
    assert "\n" not in refused.value.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
def test_root_does_not_take_over_the_stack_of_another_user(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    with held(home):
        assert (home / LOCK).stat().st_uid == 0, "an empty folder may be used"
    os.chown(home / LOCK, 65534, 65534)
    with pytest.raises(SettingsError, match=r"belongs to nobody, and you are root. Run lmaas as nobody, or set LMAAS_HOME"), held(home):
        pass


@pytest.mark.parametrize("before", [(), ("lost+found",)], ids=["empty", "a new disk"])
def test_an_empty_folder_is_taken(before: tuple[str, ...], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    for name in before:
        (home / name).mkdir(mode=0o700)
    with held(home):
        assert mode(home) == 0o700
