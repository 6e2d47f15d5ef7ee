"""Ours, as `weakseg serve` starts it: its defaults, but for what is written of each image into the log.

With PEER_WORKERS: so many of them on one port, of one thread each.
"""

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "weakseg", "serve", "--bundle", os.environ["PEER_BUNDLE"], "--host", "127.0.0.1"]
COMMAND += ["--port", os.environ["PEER_PORT"], "--metrics-port", "0", "--log-level", "warning"]

if __name__ == "__main__":
    workers = int(os.environ["PEER_WORKERS"])
    if workers:
        COMMAND += ["--share-port", "--threads", os.environ["PEER_THREADS"]]
        beside = [subprocess.Popen(COMMAND) for _ in range(workers - 1)]  # ended with this one, as its session is
    os.execv(sys.executable, COMMAND)
