"""Files and folders appear whole or not at all, and what stood before is there until the new is in its place."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loraplex.files import fill_atomically, hidden, leftovers, recover, write_atomically, write_json


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def filled(text: str) -> object:
    def fill(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)

    return fill


def left_by_a_killed_process(path: Path, what: str) -> Path:
    """Return a hidden folder beside `path` that a process made which is gone."""
    code = (
        "import os, sys, pathlib, loraplex.files as files\n"
        "left = files.hidden(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "left.mkdir(parents=True)\n"
        "(left / 'file').write_text('left')\n"
        "print(left, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), what], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    return Path(done.stdout.strip())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "é"\n}\n'
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    write_atomically(path, lambda temporary: temporary.write_text("by a writer"), durable=False)
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["by a writer"]


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_atomically(path, fail)
    assert content(tmp_path) == {"file": "old"}


def test_files_and_folders_have_the_rights_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()

    def fill(folder: Path) -> None:
        # as safetensors does
        os.close(os.open(folder / "file", os.O_CREAT, 0o600))

    def replace(temporary: Path) -> None:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT, 0o600))

    fill_atomically(tmp_path / "filled", fill)
    write_atomically(tmp_path / "text", "")
    write_atomically(tmp_path / "written", replace)
    rights = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert rights["filled"] == rights["folder"]
    usual = (tmp_path / "folder" / "file").stat().st_mode & 0o777
    assert rights["text"] == rights["written"] == usual
    assert (tmp_path / "filled" / "file").stat().st_mode & 0o777 == usual


def test_the_umask_is_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another thread that makes a file in between would make it for everybody.
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask of the whole process was set"))
    fill_atomically(tmp_path / "folder", filled("new"))


def test_what_stood_before_is_there_until_the_new_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    fill_atomically(folder, filled("old"))
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == folder and "loraplex-new" in self.name:
            raise OSError("the disk went away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk went away"):
        fill_atomically(folder, filled("new"))
    assert content(tmp_path) == {"folder/inner/file": "old"}
    monkeypatch.undo()
    fill_atomically(folder, filled("new"))
    assert content(tmp_path) == {"folder/inner/file": "new"}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill_atomically(tmp_path / "link", filled("new"))
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == {"inner/file": "new"}


def test_what_was_put_there_in_the_meantime_stays_without_replace(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def fill(temporary: Path) -> None:
        (temporary / "file").write_text("slower")
        fill_atomically(folder, filled("faster"))

    fill_atomically(folder, fill, replace=False)
    assert content(tmp_path) == {"folder/inner/file": "faster"}


def test_what_a_killed_process_left_half_done_is_deleted(tmp_path: Path) -> None:
    left = left_by_a_killed_process(tmp_path / "folder", "new")
    other = left_by_a_killed_process(tmp_path / "folder-2", "new")
    fill_atomically(tmp_path / "folder", filled("new"))
    assert not left.exists()
    assert other.exists()


def test_what_a_killed_process_had_moved_aside_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left = left_by_a_killed_process(tmp_path / "folder", "old")
    with caplog.at_level(logging.WARNING):
        recover(tmp_path / "folder")
    assert content(tmp_path) == {"folder/file": "left"}
    assert str(tmp_path / "folder") in caplog.text
    assert not left.exists()


def test_what_a_killed_process_had_replaced_is_deleted(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path / "folder", "old")
    (tmp_path / "folder").mkdir()
    recover(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_what_another_process_works_on_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, loraplex.files as files\n"
        "files.hidden(pathlib.Path(sys.argv[1]), 'new').mkdir()\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert leftovers(tmp_path / "folder", "new") == []
        recover(tmp_path / "folder")
        (working,) = tmp_path.iterdir()
        process.communicate("")
    assert leftovers(tmp_path / "folder", "new") == [working]


def test_what_another_machine_works_on_is_left_alone_for_a_day(tmp_path: Path) -> None:
    own = hidden(tmp_path / "folder", "old")
    middle = own.name.split("-")
    middle[2] = "elsewhere"
    foreign = own.with_name("-".join(middle))
    foreign.mkdir()
    assert leftovers(tmp_path / "folder", "old") == []


def test_threads_that_fill_the_same_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def fill(folder: Path) -> None:
        both.wait(60)
        (folder / "file").write_text("whole")

    threads = [
        threading.Thread(target=fill_atomically, args=(tmp_path / "folder", fill), kwargs={"replace": False})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(tmp_path) == {"folder/file": "whole"}
