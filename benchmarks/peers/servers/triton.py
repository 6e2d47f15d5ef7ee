"""Triton, by pytriton: its server, whose Python backend hands batches to this process, where jobs are threads."""

import signal
import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.model_config.common import QueuePolicy
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.processes import free_port
from benchmarks.peers.servers.job import Job
from benchmarks.peers.servers.setting import BATCH, DELAY_S, PORT, QUEUE, WORKERS

# Triton's backend brings no library of Python, uses the one that it finds beside this Python, and can be older than it:
# then it lacks what multiprocessing asks of a lock from 3.11.6 on, https://github.com/triton-inference-server/pytriton/issues/51.
# It heeds no PYTHONPATH, so the remedy lies in the environment's packages.
LOCK = """\
import threading
from multiprocessing import resource_tracker
resource_tracker._resource_tracker._lock = threading._PyRLock()
"""


def main() -> None:
    Path(sysconfig.get_path("purelib"), "sitecustomize.py").write_text(LOCK)
    job = Job()

    @batch
    def segment(image: NDArray[np.object_]) -> list[NDArray[np.object_]]:  # (B, 1) both
        return [np.array(job(image[:, 0].tolist()), np.object_)[:, None]]

    delay_us = int(1e6 * DELAY_S) if BATCH > 1 else 0
    batcher = DynamicBatcher(
        max_queue_delay_microseconds=delay_us, default_queue_policy=QueuePolicy(max_queue_size=QUEUE)
    )
    here = "127.0.0.1"
    config = TritonConfig(
        grpc_address=here,
        grpc_port=PORT,
        http_address=here,
        http_port=free_port(),
        metrics_address=here,
        metrics_port=free_port(),
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="model",
            infer_func=[segment] * WORKERS,
            inputs=[Tensor(name="image", dtype=np.bytes_, shape=(1,))],
            outputs=[Tensor(name="mask", dtype=np.bytes_, shape=(1,))],
            config=ModelConfig(max_batch_size=BATCH, batcher=batcher),
            strict=False,
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops by Ctrl-C
        triton.serve()


if __name__ == "__main__":
    main()
