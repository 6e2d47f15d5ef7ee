"""LitServe: a process for each job, and as many that speak HTTP, which is its default."""

from typing import Annotated

import litserve
from fastapi import Body, Response

from benchmarks.peers.servers.job import Image, Job, decode, encode
from benchmarks.peers.servers.setting import BATCH, DELAY_S, PORT, WORKERS


class Segmentation(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.job = Job()

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> Image:
        return decode(request)

    def batch(self, inputs: list[Image]) -> list[Image]:
        return inputs

    def predict(self, x: Image | list[Image]) -> Image | list[Image]:
        return self.job.infer(x) if isinstance(x, list) else self.job.infer([x])[0]

    def unbatch(self, output: list[Image]) -> list[Image]:
        return output

    def encode_response(self, output: Image) -> Response:
        return Response(encode(output), media_type="image/png")


if __name__ == "__main__":
    api = Segmentation(max_batch_size=BATCH, batch_timeout=DELAY_S if BATCH > 1 else 0.0)
    # fast_queue: ZeroMQ in place of a multiprocessing manager, for high rates.
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False)
