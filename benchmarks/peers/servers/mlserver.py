"""MLServer: a custom runtime, a process of it for each job, adaptive batching in front of them."""

import json
import os
import sys
from pathlib import Path

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.peers.processes import free_port
from benchmarks.peers.servers.job import Job
from benchmarks.peers.servers.setting import BATCH, DELAY_S, PORT, WORKERS


class Segmentation(MLModel):
    async def load(self) -> bool:
        self.job = Job()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        masks = self.job(payload.inputs[0].data.root)
        output = ResponseOutput(name="mask", shape=[len(masks)], datatype="BYTES", data=masks)
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    server = {"host": "127.0.0.1", "grpc_port": PORT, "http_port": free_port(), "metrics_port": free_port()}
    server |= {"parallel_workers": WORKERS, "debug": False, "grpc_max_message_length": 32 << 20}
    model = {"name": "model", "implementation": "benchmarks.peers.servers.mlserver.Segmentation"}
    if BATCH > 1:
        model |= {"max_batch_size": BATCH, "max_batch_time": DELAY_S}
    Path("settings.json").write_text(json.dumps(server))
    Path("model-settings.json").write_text(json.dumps(model))
    command = str(Path(sys.executable).with_name("mlserver"))
    os.execv(command, [command, "start", "."])
