"""What was told as saved is there after a power cut, whenever it comes."""

import jax
import numpy as np
import pytest

from rpo_jax.core.files import atomic_directory, atomic_write, recover
from rpo_jax.runs.checkpoints import Checkpoints, set_aside_damaged
from tests.power import PowerCuts

CUTS = [pytest.param(5, 0, id="some"), *(pytest.param(1, seed, marks=pytest.mark.slow) for seed in range(1, 6))]


def state_of(step):
    return {"params": {"w": np.full((4, 3), float(step), np.float32)}, "moment": np.full(3, step, np.int32)}


@pytest.mark.parametrize(("every", "seed"), CUTS)
def test_a_saved_checkpoint_survives(tmp_path, every, seed):
    folder, saved = tmp_path / "run" / "checkpoints", [0]
    folder.mkdir(parents=True)
    with PowerCuts(tmp_path / "run", tmp_path / "disks", lambda: saved[0], every, seed) as power:
        checkpoints = Checkpoints(folder, keep_last=2)
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_of(step), {"step": step})
            if step % 2:
                checkpoints.wait()
                saved[0] = step
        checkpoints.close()
    assert len(power.cuts) >= 12
    for remains, last in power.cuts:
        if not last:
            continue
        said = []
        set_aside_damaged(remains / "checkpoints", said.append)
        found = Checkpoints(remains / "checkpoints")
        step = found.latest_step()
        assert step is not None, (remains, said)
        assert step >= last, (remains, said)
        jax.tree.map(np.testing.assert_array_equal, found.restore(step, state_of(0)), state_of(step))
        found.close()
    assert {0, 1, 3} == {last for _, last in power.cuts}


def test_an_older_checkpoint_is_taken_back_where_no_other_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1), {})
    checkpoints.close()
    (tmp_path / "removed").mkdir(exist_ok=True)
    (tmp_path / "1").rename(tmp_path / "removed" / "1")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "checksums.json").write_text("")
    said = []
    set_aside_damaged(tmp_path, said.append)
    again = Checkpoints(tmp_path)
    assert again.steps() == [1]
    again.close()
    assert "the checkpoint of step 1 was to be removed and is taken back" in said[1]


@pytest.mark.parametrize("write", ["file", "folder"])
def test_an_export_is_the_old_or_the_new_one(tmp_path, write):
    home, seen = tmp_path / "home", set()
    home.mkdir()

    def put(number):
        if write == "file":
            atomic_write(home / "file", f"content {number}")
        else:
            with atomic_directory(home / "file", overwrite=True) as new:
                (new / "below").mkdir()
                (new / "below" / "a").write_text(f"content {number}")

    put(0)
    with PowerCuts(home, tmp_path / "disks", lambda: None) as power:
        put(1)
    assert len(power.cuts) > 1
    for remains, _ in power.cuts:
        recover(remains / "file")
        found = remains / "file" if write == "file" else remains / "file" / "below" / "a"
        seen.add(found.read_text())
    assert seen <= {"content 0", "content 1"}
    assert (home / "file").exists()
