"""Ours, as `weakseg serve` starts it: its defaults, but for what is written of each image into the log."""

import os
import sys

COMMAND = [sys.executable, "-m", "weakseg", "serve", "--bundle", os.environ["PEER_BUNDLE"], "--host", "127.0.0.1"]
COMMAND += ["--port", os.environ["PEER_PORT"], "--metrics-port", "0", "--log-level", "warning"]

if __name__ == "__main__":
    os.execv(sys.executable, COMMAND)
