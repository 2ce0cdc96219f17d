"""Files of computed values: damage is reported, and a full disk ends nothing."""

from safetensors import SafetensorError

from rpo_jax.core import store


def raising(error):
    def read():
        raise error

    return read


def test_damage_is_told_in_one_line(tmp_path, caplog):
    assert store.fault(lambda: 1) is None
    for error in (ValueError("not\n what it was"), OSError("not\n what it was"), SafetensorError("not\n what it was")):
        assert store.fault(raising(error)) == "not what it was"
        assert store.load("Values", tmp_path / "a", raising(error)) is None
    assert caplog.text.count("Values in ") == caplog.text.count("a are computed again: not") == 3


def test_values_that_cannot_be_kept_are_told_of_once_and_again_where_they_can():
    said = []
    values = store.ByProduct("Values", said.append)
    for write in (raising(OSError("no space left")), raising(OSError("no space left")), lambda: None, lambda: None):
        values.write(write)
    assert said == ["Values are not kept: no space left; it goes on without them", "Values are kept again"]


def test_a_file_that_cannot_be_removed_is_left(tmp_path):
    store.discard(tmp_path)  # a folder, which is not unlinked
    store.discard(tmp_path / "absent")
    (tmp_path / "file").touch()
    store.discard(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
