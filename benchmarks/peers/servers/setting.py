"""What a server is told, in the environment, which every framework's workers inherit."""

from __future__ import annotations

import os

BUNDLE = os.environ["PEER_BUNDLE"]  # the folder of a model bundle
PORT = int(os.environ["PEER_PORT"])
WORKERS = int(os.environ["PEER_WORKERS"])  # how many jobs there are
THREADS = int(os.environ["PEER_THREADS"])  # of ONNX Runtime, in each
BATCH = int(os.environ["PEER_BATCH"])  # images at most; 1: no batches
DELAY_S = 0.005  # that a batch may wait for more
QUEUE = 64  # requests that may wait, where the framework has such a limit: our server's own default
