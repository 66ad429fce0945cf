#!/usr/bin/env python3
"""measure.py COMPILER FLAGS_FILE SOURCE SECONDS GIGABYTES: compiles SOURCE and fails where that takes more than twice as much CPU time or memory.

CPU time is user and system time of the compiler and all that it runs; memory is the peak resident set of the largest of them.
"""
import os
import subprocess
import sys
import tempfile

TRIES = 3  # the least counts: where caches and cores are shared, CPU time grows too


def compile_once(compiler, flags, source, folder):
    process = subprocess.Popen([compiler, "@" + flags, "-c", source, "-o", os.path.join(folder, "unit.o")])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{source} does not compile")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def main():
    compiler, flags, source, seconds, gigabytes = *sys.argv[1:4], *map(float, sys.argv[4:6])
    least_seconds = least_gigabytes = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TRIES):
            s, g = compile_once(compiler, flags, source, folder)
            print(f"{os.path.basename(source)}: {s:.2f} s of CPU time (stated: {seconds:g}), {g:.2f} GB (stated: {gigabytes:g})", flush=True)
            least_seconds, least_gigabytes = min(s, least_seconds), min(g, least_gigabytes)
            if least_seconds <= 2 * seconds and least_gigabytes <= 2 * gigabytes:
                return
    sys.exit("more than twice what is stated")


if __name__ == "__main__":
    main()
