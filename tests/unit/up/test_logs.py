"""Logs of a stack have a bounded size, while their processes continue to write."""

import shutil
from pathlib import Path

import pytest

from lmaas.up.logs import trim


def test_a_large_log_is_moved_aside_and_its_process_writes_on(tmp_path: Path) -> None:
    (tmp_path / "small.log").write_text("few")
    with (tmp_path / "gateway.log").open("ab", buffering=0) as log:
        log.write(b"1" * 101)
        trim(tmp_path, 100)
        log.write(b"new")
        assert (tmp_path / "gateway.log").read_bytes() == b"new"
        assert (tmp_path / "gateway.log.1").read_bytes() == b"1" * 101
        log.write(b"2" * 200)
        trim(tmp_path, 100)
    assert (tmp_path / "gateway.log.1").read_bytes() == b"new" + b"2" * 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gateway.log", "gateway.log.1", "small.log"]
    assert (tmp_path / "small.log").read_text() == "few"


def test_without_room_for_a_copy_the_log_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    (tmp_path / "gateway.log").write_bytes(b"1" * 101)
    trim(tmp_path, 100)
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("gateway.log", 0)]


def test_a_folder_that_does_not_exist_has_no_logs(tmp_path: Path) -> None:
    trim(tmp_path / "none")
