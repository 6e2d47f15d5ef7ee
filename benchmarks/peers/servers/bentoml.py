"""BentoML. For batches as its documentation has it where a request is one image: a service that takes requests, before
the one whose method is `batchable`. Else one service, a process of it for each job."""

import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
from bentoml.validators import ContentType

from benchmarks.peers.servers.job import Job
from benchmarks.peers.servers.setting import BATCH, PORT, QUEUE, WORKERS

Jpeg = Annotated[Path, ContentType("image/jpeg")]
Png = Annotated[bytes, ContentType("image/png")]
KEPT = {"max_requests": 10**12, "max_age": 1e9}
LOGS = {"access": {"enabled": False}}


if BATCH == 1:
    # Its limit is shared out among the processes, connections are as they come: so each has room for all.
    @bentoml.service(workers=WORKERS, threads=1, logging=LOGS, traffic={"max_concurrency": WORKERS * (QUEUE + 1)})
    class Segmentation:
        def __init__(self) -> None:
            self.job = Job()

        @bentoml.api
        def segment(self, image: Jpeg, /) -> Png:
            return self.job([image.read_bytes()])[0]

else:
    # By default the client of a service is made anew after 100 calls, and those under way fail:
    # https://github.com/bentoml/BentoML/issues/5540
    @bentoml.service(workers=WORKERS, threads=1, logging=LOGS, runner_connection=KEPT)
    class Batches:
        def __init__(self) -> None:
            self.job = Job()

        @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=60_000)
        def segment(self, images: list[bytes]) -> list[bytes]:
            return self.job(images)

    @bentoml.service(workers=1, logging=LOGS, traffic={"max_concurrency": QUEUE + WORKERS * BATCH})
    class Segmentation:
        batches = bentoml.depends(Batches)

        @bentoml.api
        async def segment(self, image: Jpeg, /) -> Png:
            return (await self.batches.to_async.segment([image.read_bytes()]))[0]


if __name__ == "__main__":
    # BentoML keeps what it makes below its home, and says what is used to its makers unless it is told not to.
    os.environ |= {"BENTOML_HOME": str(Path.cwd()), "BENTOML_DO_NOT_TRACK": "True"}
    service = "benchmarks.peers.servers.bentoml:Segmentation"
    command = [sys.executable, "-m", "bentoml", "serve", service, "--host", "127.0.0.1", "--port", str(PORT)]
    os.execv(sys.executable, command)
