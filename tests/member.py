"""One process of a run that does nothing but exchange, for tests/test_members.py; it needs no devices.

python -m tests.member PORT COUNT PROCESS_ID ROUNDS BYTES SILENT_SECONDS
"""

from __future__ import annotations

import sys
import time

import numpy as np

from rpo_jax.hosts import channel
from rpo_jax.hosts.roll_call import roll_call


def main(port: int, count: int, process_id: int, rounds: int, size: int, silent_seconds: int) -> int:
    channel.BEAT_SECONDS, channel.SILENT_SECONDS = 0.1, silent_seconds
    try:
        met = roll_call(f"127.0.0.1:{port}", count, process_id, 60)
    except ValueError as error:
        print(f"error: {error}", flush=True)
        return 2
    for number in range(rounds):
        gathered = met.gather([number * process_id, np.zeros(size, np.uint8)])
        print(number, sum(part[0] for part in gathered), flush=True)
        time.sleep(0.01)
    met.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
