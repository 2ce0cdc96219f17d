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


def test_values_that_cannot_be_kept_are_warned_of(caplog):
    store.keep("Values", raising(OSError("no space left")))
    assert "Values are not kept for the next run: no space left." in caplog.text
