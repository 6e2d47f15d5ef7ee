"""Engines. TensorRT-RTX builds them without a GPU, so where `tensorrt-rtx` is installed these tests build real ones.

That they compute what torch does is proven on a GPU: `make test-gpu`, or `pytest -m gpu tests/export/test_tensorrt.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export import engine_commands, parity
from export.dense_labels import dense_labels
from export.engine_from_onnx import engine_from_onnx, profile_from_policy
from export.half import half_from_fp32
from export.labels_output import with_labels
from export.symmetric_int8 import symmetric_int8
from weakseg.cli import main
from weakseg.engines import Platform
from weakseg.errors import ConfigError, ParityError, WeaksegError
from weakseg.preprocess import InputPolicy, prepare
from weakseg.runners import open_runner
from weakseg.runners.cuda import Cuda
from weakseg.runners.onnxruntime import OnnxRuntimeRunner
from weakseg.runners.tensorrt import TensorRtRunner, this_platform
from weakseg.tolerance import TOLERANCES

POLICY = InputPolicy(512)
PROFILE = profile_from_policy(POLICY, 8)
EDGE_SHAPES = [(1, 1, 1, 3), (2, 33, 31, 3), (1, 1, 64, 3), (3, 40, 64, 3)]


@given(max_side=st.integers(1, 4096), stride=st.integers(1, 64), batch=st.integers(1, 64))
def test_profiles_hold_what_the_policy_lets_through(max_side, stride, batch):
    policy = InputPolicy(max_side, stride=stride)
    made = profile_from_policy(policy, batch)
    assert made.smallest == (1, 1, 1, 3) and made.largest == (batch, max_side, max_side, 3)
    assert all(a <= b <= c for a, b, c in zip(made.smallest, made.typical, made.largest, strict=True))
    portrait = prepare(np.zeros((4 * max_side, 3 * max_side, 3), np.uint8), policy) if max_side < 64 else None
    assert portrait is None or all(side <= most for side, most in zip(portrait.shape, made.largest[1:], strict=True))


def test_the_typical_size():
    assert profile_from_policy(InputPolicy(512, stride=32), 8).typical == (8, 384, 512, 3)
    assert profile_from_policy(InputPolicy(500, stride=32), 8).typical == (8, 384, 500, 3)
    assert profile_from_policy(InputPolicy(512), 1, (375, 500)).typical == (1, 375, 500, 3)


@pytest.mark.parametrize(("batch", "typical"), [(0, None), (1, (513, 1)), (1, (0, 5))])
def test_impossible_profiles(batch, typical):
    with pytest.raises(ConfigError, match="a batch of at least 1 and a typical size within 512 x 512, got"):
        profile_from_policy(POLICY, batch, typical)


def run(model: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return dict(zip([out.name for out in session.get_outputs()], session.run(None, {"images": images}), strict=True))


@pytest.mark.parametrize("shape", EDGE_SHAPES)
def test_dense_labels_are_the_graphs_labels(exported_toys, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    sparse = with_labels(exported_toys["segmentation"])
    dense = dense_labels(sparse)
    assert "NonZero" not in {node.op_type for node in onnx.load_from_string(dense).graph.node}
    expected, got = run(sparse, images), run(dense, images)
    assert list(got) == ["logits", "labels"] and got["labels"].dtype == np.uint8
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def colour_logits(n_channels: int, function: str = "Identity") -> bytes:
    """ONNX: logit c of a cell is c times the sum of a function of its colours, averaged; so the last one wins."""
    weights = np.arange(n_channels, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 1, 1), np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node(function, ["planes"], ["values"]),
        helper.make_node("AveragePool", ["values"], ["cells"], kernel_shape=[4, 4], strides=[4, 4], ceil_mode=1),
        helper.make_node("Conv", ["cells", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", n_channels, "h", "w"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def test_dense_labels_of_more_than_254_classes():
    dense = dense_labels(with_labels(colour_logits(300)))
    labels = run(dense, np.full((2, 6, 5, 3), 10, np.uint8))["labels"]
    assert labels.dtype == np.int32 and labels.shape == (2, 6, 5) and (labels == 299).all()


@pytest.mark.parametrize(("n_channels", "ignore"), [(3, 255), (300, 65535)])
@pytest.mark.parametrize("function", ["Reciprocal", "Log", "Acosh"])  # of 0: infinity, minus infinity, NaN
def test_dense_labels_of_an_image_whose_logits_are_not_finite(n_channels, ignore, function):
    images = np.full((2, 6, 5, 3), 9, np.uint8)
    images[0, 5, 4] = 0
    labels = run(dense_labels(with_labels(colour_logits(n_channels, function))), images)["labels"]
    assert (labels[0] == ignore).all() and (labels[1] == n_channels - 1).all()


def test_a_graph_without_labels_is_left_alone(exported_toys):
    assert dense_labels(exported_toys["classifier"]) == exported_toys["classifier"]


def quantised(scale: float, zero: np.generic) -> bytes:
    """logits = a convolution of quantised pixels with int8 weights 0.01 and int32 biases 2 * scale / 100."""
    stored = {
        "scale": np.float32(scale),
        "zero": zero,
        "weights": np.ones((2, 3, 1, 1), np.int8),
        "weights_scale": np.full(2, 0.01, np.float32),
        "weights_zero": np.zeros(2, np.int8),
        "bias": np.full(2, 2, np.int32),
        "bias_scale": np.full(2, scale / 100, np.float32),
        "offset": np.float32(100),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "offset"], ["centred"]),
        helper.make_node("QuantizeLinear", ["centred", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["weights", "weights_scale", "weights_zero"], ["w"], axis=0),
        helper.make_node("DequantizeLinear", ["bias", "bias_scale"], ["b"], axis=0),
        helper.make_node("Conv", ["x", "w", "b"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "quantised",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 2, "h", "w"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


# Pixels minus 100 lie in [-100, 155], which each of these holds.
ZEROS = [(1.0, np.uint8(100)), (1.25, np.uint8(124)), (1.0, np.int8(-28)), (1.25, np.int8(0))]


@pytest.mark.parametrize(("scale", "zero"), ZEROS)
def test_symmetric_quantisation_keeps_the_range(scale, zero):
    """Each of three colours may differ by half a step of either scale."""
    data = quantised(scale, zero)
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    before, after = run(data, images)["logits"], run(symmetric_int8(data), images)["logits"]
    farthest = max(np.iinfo(zero.dtype).max - int(zero), int(zero) - np.iinfo(zero.dtype).min) if zero else 127
    steps = scale * (1 + farthest / 127) / 2
    assert np.abs(before - after).max() <= 0.01 * 3 * steps + 1e-5
    types = {t.name: t.data_type for t in onnx.load_from_string(symmetric_int8(data)).graph.initializer}
    quantizers = [n for n in onnx.load_from_string(symmetric_int8(data)).graph.node if "Linear" in n.op_type]
    assert {types[node.input[2]] for node in quantizers} == {TensorProto.INT8} and len(quantizers) == 3


def test_a_graph_that_quantises_nothing_is_left_alone(exported_toys):
    assert symmetric_int8(exported_toys["classifier"]) == exported_toys["classifier"]


class Doubled:
    """A runner whose maps are twice what they should be."""

    def __init__(self, inner: OnnxRuntimeRunner) -> None:
        self.inner, self.provider, self.close = inner, inner.provider, inner.close

    def run(self, graph, images, outputs=None):
        return {name: 2 * value for name, value in self.inner.run(graph, images, outputs).items()}


def test_another_runtime_may_be_the_reference(exported_toys, tmp_path):
    path = tmp_path / "classifier.onnx"
    path.write_bytes(exported_toys["classifier"])
    images = engine_commands.example_images(None, InputPolicy(64))
    runner = open_runner({"classifier": path}, threads=1)
    settings = {"normalisation": "max", "runtime": "x", "precision": "fp32", "views": 1, "max_side": 64}
    report = parity.compare("classifier", runner, runner, images, **settings)
    assert report.n_cases == 11 and max(report.summary()["cam"], report.summary()["scores"]) == 0
    with pytest.raises(ParityError, match="graph classifier, output"):
        parity.compare("classifier", runner, Doubled(runner), images, **settings)


def test_what_is_compared_on(tmp_path):
    made = engine_commands.example_images(None, InputPolicy(64))
    assert len(made) == 3 and all(max(image.shape) <= 64 for image in made)
    with pytest.raises(WeaksegError, match="expected photographs .* got none: name another folder with --images"):
        engine_commands.example_images(tmp_path, InputPolicy(64))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "0"], "a batch of at least 1"),
        (["--precision", "int8"], "expected a precision of fp32, got 'int8'"),
        (["--images", "nowhere"], "expected photographs"),
    ],
)
def test_the_command_says_what_is_wrong(toy_bundle, capsys, args, message):
    assert main(["export", "--target", "tensorrt", str(toy_bundle), *args]) == 2
    assert message in capsys.readouterr().err


# ---- real engines, built without a GPU

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason='tensorrt-rtx is not installed: pip install "tensorrt-rtx"'
)


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx")


def test_engines_are_built_where_there_is_no_torch():
    """The extra `tensorrt` has onnx and onnxruntime, not what exports from torch."""
    absent = "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx_ir', 'onnxscript'], None))"
    subprocess.run([sys.executable, "-c", f"{absent}; import export.engine_commands"], check=True)


@pytest.fixture(scope="module")
def l4(rtx):
    return Platform("tensorrt_rtx", rtx.__version__, "NVIDIA L4", "8.9")


@needs_rtx
@pytest.mark.parametrize("graph", ["classifier", "classifier_multiscale", "segmentation"])
def test_exported_graphs_are_built(exported_toys, rtx, l4, graph):
    """Cast before transposition, sizes without remainders, labels without NonZero: RTX refused these graphs before."""
    data = exported_toys[graph]
    data = with_labels(data) if graph == "segmentation" else data
    assert len(engine_from_onnx(rtx, graph, data, PROFILE, l4)) > 100_000


@needs_rtx
@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("graph", ["classifier_multiscale", "segmentation"])
def test_graphs_of_16_bits_are_built(exported_toys, rtx, l4, graph, half):
    data = half_from_fp32(exported_toys[graph], half)
    data = with_labels(data) if graph == "segmentation" else data
    assert len(engine_from_onnx(rtx, graph, data, PROFILE, l4)) > 100_000


@needs_rtx
@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_an_engine_computes_in_the_types_of_its_graph(rtx, l4, kind):
    """Strongly typed: a convolution over half floats is taken as it is, one over two types is refused."""
    model = onnx.load_from_string(colour_logits(21))
    [convolution] = [node for node in model.graph.node if node.op_type == "Conv"]
    position = list(model.graph.node).index(convolution)
    for name in ("cells", "weights"):
        model.graph.node.insert(position, helper.make_node("Cast", [name], [f"{name}_16"], to=kind))
    convolution.input[:] = ["cells_16", "weights_16"]
    convolution.output[:] = ["logits_16"]
    model.graph.node.append(helper.make_node("Cast", ["logits_16"], ["logits"], to=TensorProto.FLOAT))
    assert engine_from_onnx(rtx, "segmentation", model.SerializeToString(), PROFILE, l4)
    convolution.input[1] = "weights"
    with pytest.raises(WeaksegError, match=r"segmentation is not one that .* takes|no engine of graph segmentation"):
        engine_from_onnx(rtx, "segmentation", model.SerializeToString(), PROFILE, l4)


@needs_rtx
@pytest.mark.parametrize(("scale", "zero"), ZEROS)
def test_int8_graphs_are_built(rtx, l4, scale, zero):
    assert engine_from_onnx(rtx, "segmentation", quantised(scale, zero), PROFILE, l4)


@needs_rtx
def test_what_is_no_graph_is_refused(rtx, l4, monkeypatch):
    monkeypatch.setattr("export.engine_from_onnx.dense_labels", lambda data: data)
    monkeypatch.setattr("export.engine_from_onnx.symmetric_int8", lambda data: data)
    with pytest.raises(WeaksegError, match=r"graph classifier is not one that tensorrt_rtx 1\..* takes: .*parse"):
        engine_from_onnx(rtx, "classifier", b"nothing", PROFILE, l4)


@needs_rtx
def test_rtx_builds_for_its_own_gpus_only(exported_toys, rtx, l4):
    h100 = Platform("tensorrt_rtx", rtx.__version__, "NVIDIA H100", "9.0")
    with pytest.raises(ConfigError, match=r"tensorrt_rtx builds for SM75, .*, got SM90: use --target tensorrt"):
        engine_from_onnx(rtx, "classifier", exported_toys["classifier"], PROFILE, h100)


# ---- on a GPU


def why_not(library: str) -> str | None:
    """Why engines of a library cannot be run here."""
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    try:
        Cuda()
    except ConfigError as error:
        return str(error)
    return None


def unless_missing(library: str):
    reason = why_not(library)
    return pytest.param(library, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))


@pytest.fixture(params=[unless_missing("tensorrt"), unless_missing("tensorrt_rtx")])
def library(request):
    return importlib.import_module(request.param)


@pytest.fixture
def engine(library, tmp_path):
    """A function: ONNX to an open runner over its engine. The timing cache is used from the second on."""
    runners = []

    def build(graph: str, data: bytes, max_side: int = 512, batch: int = 4) -> TensorRtRunner:
        platform = this_platform(library, Cuda())
        profile = profile_from_policy(InputPolicy(max_side), batch)
        plan = engine_from_onnx(library, graph, data, profile, platform, tmp_path / "times")
        runners.append(TensorRtRunner({graph: plan}, library.__name__))
        return runners[-1]

    yield build
    for runner in runners:
        runner.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["classifier", "classifier_multiscale", "segmentation"])
def test_engines_compute_what_torch_does(engine, toy_graphs, exported_toys, graph):
    data = with_labels(exported_toys[graph]) if graph == "segmentation" else exported_toys[graph]
    assert agreement(toy_graphs(0)[graph], engine(graph, data), graph, "fp32") >= TOLERANCES["fp32"].label_agreement


@pytest.mark.gpu
@pytest.mark.parametrize("half", ["fp16", "bf16"])
@pytest.mark.parametrize("graph", ["classifier", "segmentation"])
def test_half_precision_engines_compute_what_torch_does(engine, toy_graphs, exported_toys, graph, half):
    narrow = engine(graph, half_from_fp32(exported_toys[graph], half))
    assert agreement(toy_graphs(0)[graph], narrow, graph, half) >= TOLERANCES[half].label_agreement


def agreement(module, runner, graph, precision):
    """Share of equal labels; further off than the precision may be, an error."""
    report = parity.compare(
        graph,
        module,
        runner,
        engine_commands.example_images(None, InputPolicy(160)),
        normalisation="max",
        runtime="tensorrt",
        precision=precision,
        views=getattr(module, "n_views", 1),
        max_side=512,
    )
    return report.summary()["labels"]


@pytest.mark.gpu
def test_a_bundles_engines_from_command_to_mask(library, toy_bundle, tmp_path, monkeypatch, colours, capsys):
    """The toy bundle's answers have a closed form: its colours."""
    import weakseg

    monkeypatch.setenv("WEAKSEG_ENGINE_CACHE", str(tmp_path))
    target = library.__name__.replace("_", "-")
    with pytest.raises(ConfigError, match=f"build it here with `weakseg export --target {target}"):
        weakseg.load(toy_bundle, runtime=target)
    assert main(["export", "--target", target, str(toy_bundle), "--batch", "2", "--json"]) == 0
    assert '"classifier_multiscale"' in capsys.readouterr().out
    with weakseg.load(toy_bundle, runtime=target) as fast, weakseg.load(toy_bundle) as exact:
        np.testing.assert_array_equal(fast.segment(colours).segmentation, exact.segment(colours).segmentation)
