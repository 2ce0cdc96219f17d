"""Files of our own: whole at any moment, and nothing beside them afterwards."""

import os

import pytest

from rpo_jax.core.files import atomic_write


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
