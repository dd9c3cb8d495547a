"""Locks: one holder, told apart from a stale file, released by whatever ends the holder.

Catches: two writers at once, in threads, in processes or by two names of one file; a lock that outlives a killed
process, also one whose child lives on; a lock file of a dead process that keeps everybody out; files left behind.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hf_hybrid.locks import InUseError, exclusive

HOLD = """
import os, sys, time
from pathlib import Path
from hf_hybrid.locks import exclusive
with exclusive(Path(sys.argv[1]), "run"):
    if os.fork() == 0:  # such as a worker of a data loader
        print("held", flush=True)  # the child: until it runs, its copy of the lock is open
        time.sleep(5)
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "file", "absent file"])
def test_one_holder_at_a_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "out.jsonl"
    if kind == "file":
        path.write_text("kept")
    seen: list[str] = []

    def other() -> None:
        try:
            with exclusive(path, "run"):
                seen.append("held")
        except InUseError as error:
            seen.append(str(error))

    with exclusive(path, "run"):
        with pytest.raises(InUseError, match=f"{path} is in use by another run: wait"), exclusive(path, "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(seen) == 1 and "in use" in seen[0]
    other()
    assert seen[1] == "held"
    assert [p.name for p in tmp_path.iterdir()] == (["out.jsonl"] if kind == "file" else [])
    assert kind != "file" or path.read_text() == "kept"


def test_neighbours_do_not_share_a_lock(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a", "run"), exclusive(tmp_path / "b", "run"), exclusive(tmp_path, "run"):
        assert len(list(tmp_path.iterdir())) == 3


def test_two_names_of_one_file_are_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "name").symlink_to(tmp_path / "real" / "file")
    with (
        exclusive(tmp_path / "link", "run"),
        pytest.raises(InUseError),
        exclusive(tmp_path / "real", "run"),
    ):
        pass
    with exclusive(tmp_path / "name", "run"), pytest.raises(InUseError), exclusive(tmp_path / "real" / "file", "run"):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(InUseError), exclusive(tmp_path, "run"):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / ".lock").exists()  # left by the dead; it keeps nobody out
    with exclusive(tmp_path, "run"):
        pass
    assert not (tmp_path / ".lock").exists()


def test_an_error_inside_releases(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path, "run"):
        raise KeyboardInterrupt
    with exclusive(tmp_path, "run"):
        assert (tmp_path / ".lock").exists()


def test_a_place_that_cannot_be_written_is_no_other_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught, exclusive(tmp_path / "file" / "x", "run"):
        pass
    assert not isinstance(caught.value, InUseError)
