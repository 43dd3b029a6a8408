"""Runs the command line peers and accounts for them, in a process of its own.

Small on purpose (``python -I -S``, few imports): Linux counts the memory of the process that starts
a command as the command's own peak, so a parent of 200 MB would hide whatever the command needs.
"""

import json
import os
import sys
import time


def main() -> None:
    print(json.dumps({"idle_mb": 0.0}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        actions = [(os.POSIX_SPAWN_DUP2, 2, 1)]
        start = time.perf_counter()
        argv = job["argv"]
        pid = os.posix_spawn(argv[0], argv, {**os.environ, **job["env"]}, file_actions=actions)
        _, status, usage = os.wait4(pid, 0)
        answer = {
            "wall_s": time.perf_counter() - start,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_mb": usage.ru_maxrss * 1024 / 1e6,
            "extra": {},
        }
        if code := os.waitstatus_to_exitcode(status):
            answer = {"error": f"exit code {code}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
