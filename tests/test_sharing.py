"""Several processes compute a list as one does; real ones exchange results in test_distributed.py."""

import numpy as np
import pytest

from rpo_jax.hosts import processes, sharing


def as_processes(monkeypatch, count, items, work):
    """What `shared` returns on each of so many processes: a first round hears what each gives, a second one goes on."""
    given = {}

    class Heard(Exception):
        pass

    def hear(mine):
        given[processes.process_id()] = mine
        raise Heard

    monkeypatch.setattr(processes, "num_processes", lambda: count)
    results = []
    for process_id in range(count):
        monkeypatch.setattr(processes, "process_id", lambda own=process_id: own)
        monkeypatch.setattr(processes, "gather", hear)
        with pytest.raises(Heard):
            sharing.shared(items, work)
    for process_id in range(count):
        monkeypatch.setattr(processes, "process_id", lambda own=process_id: own)
        monkeypatch.setattr(processes, "gather", lambda mine: [given[i] for i in range(count)])
        results.append(sharing.shared(items, work))
    return results, given


@pytest.mark.parametrize("size", [0, 1, 64, 65, 200, 640])
@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_have_the_results_of_one(monkeypatch, count, size):
    items = list(range(size))
    results, given = as_processes(monkeypatch, count, items, lambda some: [{"square": item**2} for item in some])
    for result in results:
        assert result == [{"square": item**2} for item in items]
    assert sum(map(len, given.values())) == size, "each item is worked on once"


def test_neighbours_stay_on_one_process(monkeypatch):
    _, given = as_processes(monkeypatch, 2, list(range(200)), lambda some: some)
    assert given[0] == [*range(64), *range(128, 192)]
    assert given[1] == [*range(64, 128), *range(192, 200)]


def test_one_process_gets_what_its_work_returns():
    result = [np.zeros(3)]
    assert sharing.shared((1,), lambda some: result) is result


def test_a_result_must_come_for_every_item(monkeypatch):
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    with pytest.raises(AssertionError, match="one result for each item"):
        sharing.shared([1, 2, 3], lambda some: [])
