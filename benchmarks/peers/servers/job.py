"""What each server does with a photograph, the same code in all: JPEG, OpenCV, ONNX Runtime, PNG of the label map."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.peers.servers.setting import BUNDLE, THREADS

Image = NDArray[np.uint8]


class Job:
    """Calls may come from several threads."""

    def __init__(self) -> None:
        cv2.setNumThreads(1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self._session = onnxruntime.InferenceSession(
            f"{BUNDLE}/segmentation.onnx", options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, files: Sequence[bytes]) -> list[bytes]:
        return [encode(labels) for labels in self.infer([decode(file) for file in files])]

    def infer(self, images: Sequence[Image]) -> list[Image]:
        """Label maps; images of one size go through the network together."""
        if len({image.shape for image in images}) == 1:
            return list(self._run(np.stack(images)))
        return [self._run(image[None])[0] for image in images]

    def _run(self, images: Image) -> Image:
        labels: Image = self._session.run(["labels"], {"images": images})[0]
        return labels


def decode(file: bytes) -> Image:
    """(H, W, 3) RGB."""
    image = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8)


def encode(labels: Image) -> bytes:
    return bytes(cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])
