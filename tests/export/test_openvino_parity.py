"""OpenVINO computes exported graphs within the tolerance of fp32, at every edge size, alone and in batches."""

from importlib.util import find_spec

import numpy as np
import pytest

from export import parity


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra `openvino`")
@pytest.mark.parametrize("name", ["classifier", "classifier_multiscale", "segmentation"])
def test_parity_with_torch(name, toy_graphs, exported_toys, tmp_path):
    path = tmp_path / "graph.onnx"
    path.write_bytes(exported_toys[name])
    images = [np.random.default_rng(i).integers(0, 256, (60 + 7 * i, 90, 3), dtype=np.uint8) for i in range(2)]
    report = parity.check(name, toy_graphs()[name], path, images, runtime="openvino")
    assert report.summary()["labels"] >= 0.999
