from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from weakseg.bundle import open_bundle
from weakseg.cpu import usable_cpus
from weakseg.errors import BundleError, ConfigError, DataError, ModelFailedError
from weakseg.runners import open_runner
from weakseg.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner

GRAPHS = open_bundle(Path(__file__).parents[1] / "data" / "bundles" / "toy").graph_paths()


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def runner():
    made = OnnxRuntimeRunner(GRAPHS, threads=1)
    yield made
    made.close()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 6), (1, 1, 2000), (2, 33, 31)])
def test_outputs_by_name_and_shape(runner, shape):
    n, height, width = shape
    out = runner.run("classifier", images(*shape))
    assert out["scores"].shape == (n, 3)
    assert out["cam"].shape == (n, 3, -(-height // 4), -(-width // 4))
    assert all(value.dtype == np.float32 for value in out.values())


def test_alone_or_in_a_batch(runner):
    batch = images(4, 20, 30)
    together = runner.run("segmentation", batch)["logits"]
    for image, logits in zip(batch, together, strict=True):
        np.testing.assert_allclose(runner.run("segmentation", image[None])["logits"][0], logits, atol=1e-5)


def test_threads_share_a_runner(runner):
    batch = images(8, 16, 16)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda image: runner.run("classifier", image[None])["cam"][0], batch))
    np.testing.assert_array_equal(np.stack(parallel), runner.run("classifier", batch)["cam"])


def test_strided_images_are_taken(runner):
    batch = images(1, 8, 16)[:, :, ::2]
    copied = runner.run("classifier", batch.copy())["cam"]
    np.testing.assert_array_equal(runner.run("classifier", batch)["cam"], copied)


def test_threads_are_those_of_this_process():
    made = open_runner(GRAPHS)
    assert made.threads == usable_cpus()
    assert made.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("bad", [images(4, 4), images(1, 4, 4).astype(np.float32), images(0, 4, 4), images(1, 0, 4)])
def test_other_images_are_refused(runner, bad):
    with pytest.raises(DataError, match=r"\(B, H, W, 3\) uint8"):
        runner.run("classifier", bad)


def test_unknown_graph_and_output(runner):
    with pytest.raises(ConfigError, match="no graph 'affinity': expected one of classifier"):
        runner.run("affinity", images(1, 4, 4))
    with pytest.raises(ConfigError, match="graph classifier has the outputs scores, cam, got cam, logits"):
        runner.run("classifier", images(1, 4, 4), ["cam", "logits"])


def test_only_the_outputs_that_are_asked_for(runner):
    everything = runner.run("classifier", images(1, 4, 4))
    assert list(everything) == ["scores", "cam"]
    np.testing.assert_array_equal(runner.run("classifier", images(1, 4, 4), ["cam"])["cam"], everything["cam"])
    assert list(runner.run("classifier", images(1, 4, 4), ["cam", "scores"])) == ["cam", "scores"]


def test_unknown_runtime_provider_and_threads():
    with pytest.raises(ConfigError, match="unknown runtime 'abacus'"):
        open_runner(GRAPHS, runtime="abacus")
    with pytest.raises(
        ConfigError, match="unknown provider 'rocm' of onnxruntime: expected one of cpu, cuda, tensorrt"
    ):
        open_runner(GRAPHS, provider="rocm")
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        OnnxRuntimeRunner(GRAPHS, threads=0)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_build_without_the_provider(provider, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        ConfigError, match=r'is not in this onnxruntime, which has CPUExec.*pip install "weakseg\[gpu\]"'
    ):
        open_runner(GRAPHS, provider=provider)


def test_fallback_is_an_error(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)  # prints what it does not find
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with (
        pytest.raises(ConfigError, match="to run on CUDAExecutionProvider, got CPUExecutionProvider"),
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
    ):
        OnnxRuntimeRunner(GRAPHS, provider="cuda")


def test_io_binding_gives_the_same(runner, monkeypatch):
    batch = images(2, 20, 30)[:, ::2]
    expected = runner.run("classifier", batch)
    monkeypatch.setattr(runner, "_bind", True)
    for outputs in (None, ["cam"]):
        got = runner.run("classifier", batch, outputs)
        assert list(got) == (outputs or list(expected))
        for name, value in got.items():
            np.testing.assert_array_equal(value, expected[name])


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_computes_what_the_cpu_computes(runner, provider):
    """By IO binding, which is how devices are used. TensorRT rounds to TF32 unless NVIDIA_TF32_OVERRIDE=0 is set."""
    made = open_runner(GRAPHS, provider=provider)
    assert made.provider == PROVIDERS[provider][0][0]
    tolerance = 1e-4 if provider == "cuda" else 2e-2
    for graph in GRAPHS:
        for shape in ((1, 20, 30), (3, 33, 31)):
            got, expected = made.run(graph, images(*shape)), runner.run(graph, images(*shape))
            assert list(got) == list(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(got[name], value, atol=tolerance * max(1, np.abs(value).max()))


@pytest.mark.gpu
def test_io_binding_gives_the_same_on_a_gpu(monkeypatch):
    made = open_runner(GRAPHS, provider="cuda")
    bound = made.run("segmentation", images(2, 20, 30))["logits"]
    monkeypatch.setattr(made, "_bind", False)
    np.testing.assert_allclose(made.run("segmentation", images(2, 20, 30))["logits"], bound, atol=1e-5)


@pytest.mark.gpu
def test_threads_share_a_gpu(runner):
    made = open_runner(GRAPHS, provider="cuda")
    batch = images(8, 16, 16)
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda image: made.run("classifier", image[None])["cam"][0], batch))
    np.testing.assert_allclose(np.stack(parallel), runner.run("classifier", batch)["cam"], rtol=1e-4, atol=1e-4)


def test_damaged_graph(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="cannot load"):
        OnnxRuntimeRunner({"classifier": path})


def test_failing_runtime(runner, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ort.InferenceSession, "run", fail)
    with pytest.raises(ModelFailedError, match=r"graph classifier failed on images \(1, 4, 4, 3\): out of memory"):
        runner.run("classifier", images(1, 4, 4))
