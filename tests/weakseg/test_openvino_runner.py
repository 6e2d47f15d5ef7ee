import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from weakseg.bundle import open_bundle
from weakseg.errors import BundleError, ConfigError, DataError, ModelFailedError
from weakseg.runners import open_runner
from weakseg.runners.onnxruntime import OnnxRuntimeRunner
from weakseg.runners.openvino import TELEMETRY, OpenVinoRunner

GRAPHS = open_bundle(Path(__file__).parents[1] / "data" / "bundles" / "toy").graph_paths()


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_without_openvino_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r'^OpenVINO is not installed: pip install "weakseg\[openvino\]"$'):
        open_runner(GRAPHS, runtime="openvino")


@pytest.fixture(scope="module")
def runner():
    if find_spec("openvino") is None:  # not by importing it: that is the runner's part
        pytest.skip("needs the extra `openvino`")
    made = OpenVinoRunner(GRAPHS, threads=2)
    yield made
    made.close()


# Smaller images only exported graphs can pad, see tests/export; the toy's pooling must fit into them.
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 6), (1, 4, 2000), (2, 33, 31)])
@pytest.mark.parametrize("graph", sorted(GRAPHS))
def test_computes_what_onnxruntime_computes(runner, graph, shape):
    ours = runner.run(graph, images(*shape))
    theirs = OnnxRuntimeRunner(GRAPHS, threads=1).run(graph, images(*shape))
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5)


def test_says_what_executes_and_with_how_many_threads(runner):
    assert runner.provider == "OpenVINO CPU"
    assert runner.threads == 2


def test_fp32_is_computed_in_fp32(runner):
    for graph in runner._graphs.values():
        compiled = graph.request.get_compiled_model()
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
        assert compiled.get_property("NUM_STREAMS") == 1


def test_results_outlive_the_next_call(runner):
    first = runner.run("classifier", images(1, 8, 8))["cam"]
    kept = first.copy()
    runner.run("classifier", 255 - images(1, 8, 8))
    np.testing.assert_array_equal(first, kept)


def test_threads_share_a_runner(runner):
    batch = images(8, 16, 16)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda image: runner.run("classifier", image[None])["cam"][0], batch))
    np.testing.assert_allclose(np.stack(parallel), runner.run("classifier", batch)["cam"], atol=1e-5)


def test_only_the_outputs_that_are_asked_for(runner):
    everything = runner.run("classifier", images(1, 4, 4))
    assert list(everything) == ["scores", "cam"]
    np.testing.assert_array_equal(runner.run("classifier", images(1, 4, 4), ["cam"])["cam"], everything["cam"])


def test_refusals_read_as_those_of_other_runners(runner):
    with pytest.raises(DataError, match=r"\(B, H, W, 3\) uint8"):
        runner.run("classifier", images(4, 4))
    with pytest.raises(ConfigError, match="no graph 'affinity': expected one of classifier"):
        runner.run("affinity", images(1, 4, 4))
    with pytest.raises(ConfigError, match="graph classifier has the outputs scores, cam, got logits"):
        runner.run("classifier", images(1, 4, 4), ["logits"])
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        OpenVinoRunner(GRAPHS, threads=0)
    with pytest.raises(ConfigError, match="provider is onnxruntime's, got 'cuda' for the runtime openvino"):
        open_runner(GRAPHS, runtime="openvino", provider="cuda")


def test_damaged_graph(runner, tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="OpenVINO cannot load"):
        OpenVinoRunner({"classifier": path})


def test_failing_runtime(runner):
    with pytest.raises(ModelFailedError, match=r"graph classifier failed on images \(1, 40000000, 40000000, 3\)"):
        runner.run("classifier", np.broadcast_to(np.uint8(0), (1, 40_000_000, 40_000_000, 3)))


def test_importing_it_reports_to_nobody(runner):
    assert TELEMETRY not in sys.modules
    assert sys.modules["openvino.tools.ovc.telemetry_utils"].tm.__name__ == "openvino.tools.ovc.telemetry_stub"
