"""The child process in which a client is measured: ``python -m benchmarks.worker NAME``.

Imports what the client needs, says so, and then does one job per line of its input. Each answer has
the wall time, the CPU seconds of this process with all its threads and children, and the peak of
its memory. Only the parent's side, ``harness.py``, knows what is being compared.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
import traceback
from typing import Any

from benchmarks import clients

MB = 1_000_000


def _memory_mb(field: str) -> float:
    with open("/proc/self/status") as status:
        found = re.search(rf"{field}:\s+(\d+) kB", status.read())
    return int(found[1]) * 1024 / MB if found else 0.0


def measure(call: clients.Call, job: clients.Job) -> dict[str, Any]:
    """Do the job once; what it cost."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is now what is in use
    before, start = os.times(), time.perf_counter()
    extra = call(job)
    wall_s, after = time.perf_counter() - start, os.times()
    return {
        "wall_s": wall_s,
        "cpu_s": sum(after[:4]) - sum(before[:4]),
        "peak_mb": _memory_mb("VmHWM"),
        "extra": extra,
    }


def main() -> None:
    """Answer jobs until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    call = clients.load(sys.argv[1])
    gc.collect()
    print(json.dumps({"idle_mb": _memory_mb("VmRSS")}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = measure(call, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # Some clients' threads take seconds to end, or never do.


if __name__ == "__main__":
    main()
