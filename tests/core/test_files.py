"""Files of our own: whole at any moment, and nothing beside them afterwards."""

import errno
import os
import shutil
import socket

import pytest

from rpo_jax.core.files import atomic_directory, atomic_write, recover


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    for content in ("first", b"second"):
        atomic_write(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, call):
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def no_space(*_):
        raise OSError("no space left")

    monkeypatch.setattr(call, no_space)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_content_is_on_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given))[1])
    atomic_write(tmp_path / "file.txt", "content")
    assert done == ["fsync", "replace", "fsync"]


def test_two_processes_of_one_number_write_the_same_file_side_by_side(tmp_path, monkeypatch):
    """As two containers do to a cache that they share."""
    path, real, other = tmp_path / "file.txt", os.replace, []

    def replace(source, target):
        if not other:
            other.append(source)
            atomic_write(path, "theirs")
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    atomic_write(path, "ours")
    assert path.read_text() == "ours"
    assert os.listdir(tmp_path) == ["file.txt"]


def failing(monkeypatch, number, times, done):
    """os.replace, which reports this error so many times, and has done what it was asked for or not."""
    real, left = os.replace, [times]

    def replace(source, target):
        if left[0]:
            left[0] -= 1
            if done:
                real(source, target)
            raise OSError(number, os.strerror(number))
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    monkeypatch.setattr("rpo_jax.core.files.RENAME_PAUSES", (0.0, 0.0))


NFS = [errno.ENOENT, errno.ESTALE, errno.EBUSY]


@pytest.mark.parametrize("number", [*NFS, errno.EIO])
def test_a_rename_that_was_done_is_done_whatever_nfs_says(tmp_path, monkeypatch, number):
    with atomic_directory(tmp_path / "folder", overwrite=False) as new:
        (new / "file").write_text("old")
    for times in (1, 2, 3):
        with monkeypatch.context() as patched:
            failing(patched, number, times, done=True)
            atomic_write(tmp_path / "file.txt", str(times))
        with monkeypatch.context() as patched:
            failing(patched, number, times, done=True)
            with atomic_directory(tmp_path / "folder", overwrite=True) as new:
                (new / "file").write_text(str(times))
        assert (tmp_path / "file.txt").read_text() == (tmp_path / "folder" / "file").read_text() == str(times)
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "folder"]


@pytest.mark.parametrize("number", NFS)
def test_a_rename_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch, number):
    atomic_write(tmp_path / "file.txt", "old")
    failing(monkeypatch, number, 2, done=False)
    atomic_write(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"


@pytest.mark.parametrize("number", [*NFS, errno.EIO])
def test_a_rename_that_keeps_failing_leaves_what_was_there(tmp_path, monkeypatch, number):
    with atomic_directory(tmp_path / "folder", overwrite=False) as new:
        (new / "file").write_text("old")
    with monkeypatch.context() as patched:
        failing(patched, number, 100, done=False)
        with pytest.raises(OSError, match=os.strerror(number)), atomic_directory(tmp_path / "folder", overwrite=True):
            pass
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]


def test_what_nfs_keeps_of_an_open_file_is_in_nobodys_way(tmp_path, monkeypatch):
    """A file that is open when it is removed stays there under another name, and its folder with it."""
    path, real = tmp_path / "folder", shutil.rmtree
    for content in ("1", "2", "3"):
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", lambda place, **_: None)
            with atomic_directory(path, overwrite=True) as new:
                (new / "file").write_text(content)
        assert (path / "file").read_text() == content
    monkeypatch.setattr(shutil, "rmtree", real)
    os.replace(path, tmp_path / ".folder.replaced-1")  # killed between two renames
    recover(path)
    assert (path / "file").read_text() == "3"
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("fetching it failed (ConnectError: [Errno -2] Name or service not known)"),
        ValueError("fetching it failed ([Errno 111] Connection refused)"),
        ConnectionRefusedError(111, "Connection refused"),
        socket.gaierror(-2, "Name or service not known"),
    ],
)
def test_a_connection_that_fails_while_a_folder_is_written_is_told_as_that(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_directory(tmp_path / "new" / "folder", overwrite=True):
        raise error
    assert caught.value is error
    assert [path.name for path in (tmp_path / "new").iterdir()] == []
