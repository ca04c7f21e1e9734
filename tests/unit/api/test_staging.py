"""Folders of uploads are deleted at the end of the upload, and those of dead processes at the next start of a gateway."""

import os
import subprocess
import sys
from pathlib import Path

from lmaas.api.staging import MIN_AGE_S, staged, sweep

DIES = """
import os, sys
from pathlib import Path
from lmaas.api.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(b"x")
    os.utime(folder, (0, 0))
    os.kill(os.getpid(), 9)
"""


def test_a_folder_goes_with_its_upload(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    with staged(uploads) as folder:
        (folder / "weights").write_bytes(b"x")
        assert os.listdir(uploads) == [folder.name]
    assert os.listdir(uploads) == []


def test_what_a_killed_process_has_left_is_swept(tmp_path: Path) -> None:
    assert sweep(tmp_path / "none") == 0
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with staged(tmp_path) as live, staged(tmp_path) as young:
        os.utime(live, (0, 0))
        (tmp_path / "a file").write_bytes(b"")
        os.utime(tmp_path / "a file", (0, 0))
        assert sweep(tmp_path) == 1
        assert {path.name for path in tmp_path.iterdir()} == {live.name, young.name, "a file"}
        # Folders without a lock: one that is being created, and one of a process that died long ago.
        for age_s, left in ((MIN_AGE_S / 2, 0), (MIN_AGE_S * 2, 1)):
            (tmp_path / "other").mkdir(exist_ok=True)
            at = (tmp_path / "other").stat().st_ctime - age_s
            os.utime(tmp_path / "other", (at, at))
            assert sweep(tmp_path) == left
