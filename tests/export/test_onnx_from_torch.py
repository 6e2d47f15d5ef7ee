"""The real graphs over the toy networks of conftest.py."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.onnx_from_torch import onnx_from_graphs
from export.parity import EDGE_SIZES, batches, check, cut
from weakseg.bundle import check_graph
from weakseg.errors import ParityError, WeaksegError
from weakseg.onnx_wire import read_content


@pytest.fixture(scope="module")
def graphs(toy_graphs) -> dict[str, nn.Module]:
    return toy_graphs()


@pytest.fixture(scope="module")
def files(exported_toys, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    paths = {}
    for name, data in exported_toys.items():
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(data)
    return paths


def photos() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 64), (75, 50), (100, 101))]


@pytest.mark.parametrize("name", ["classifier", "classifier_multiscale", "segmentation"])
def test_torch_and_onnx_agree_at_every_size(graphs, files, name):
    report = check(name, graphs[name], files[name], photos())
    assert report.n_cases == 3 + len(EDGE_SIZES) + 2
    assert all(difference.ok for difference in report.differences)
    assert "labels" in report.summary()


def test_axes_are_dynamic_and_named(files):
    model = onnx.load(files["classifier_multiscale"])
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert dims == {"images": ["B", "H", "W", 3]}
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert dims == {"scores": ["B", 3], "cam": ["B", 3, "h", "w"]}


def test_bundles_take_the_files(files):
    for name, path in files.items():
        check_graph(path.read_bytes(), ("logits",) if name == "segmentation" else ("scores", "cam"), name)


def test_weights_are_stored_once_with_batch_norm_folded(files):
    single, multiple = files["classifier"].read_bytes(), files["classifier_multiscale"].read_bytes()
    assert ("", "BatchNormalization") not in read_content(multiple).operators
    weights = sum(len(w.raw_data) for w in onnx.load_from_string(single).graph.initializer)
    assert sum(len(w.raw_data) for w in onnx.load_from_string(multiple).graph.initializer) < weights + 500


def test_nothing_of_this_machine_is_inside(files):
    for path in files.values():
        data = path.read_bytes()
        for trace in (b".py", b"site-packages", b"/home", b"/root", b"stack_trace", str(Path.cwd()).encode()):
            assert trace not in data
        model = onnx.load_from_string(data)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata == {"weakseg.graph": path.stem, "weakseg.model": "toy/1"}
        assert model.producer_name == "weakseg"


@pytest.mark.slow
def test_same_weights_same_bytes_in_another_process(files, tmp_path):
    here = Path(__file__).with_name("conftest.py")
    code = (
        "import importlib.util, hashlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('toy', {str(here)!r})\n"
        "from export.onnx_from_torch import onnx_from_graphs\n"
        "toy = importlib.util.module_from_spec(spec); spec.loader.exec_module(toy)\n"
        "graph = {'classifier': toy.make_graphs()['classifier']}\n"
        "data = onnx_from_graphs(graph, {'weakseg.model': 'toy/1'})['classifier']\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    environment = {"PYTHONPATH": str(here.parents[2]), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hashlib.sha256(files["classifier"].read_bytes()).hexdigest()


def test_same_weights_same_bytes_and_modes_are_restored(files, toy_graphs):
    graph = toy_graphs()["classifier"]
    graph.train()
    graph.model.backbone.bn[0].eval()
    data = onnx_from_graphs({"classifier": graph}, {"weakseg.model": "toy/1"})["classifier"]
    assert data == files["classifier"].read_bytes()
    assert graph.training
    assert graph.model.training
    assert not graph.model.backbone.bn[0].training
    assert type(graph.model).__name__ == "Classifier"


class Splitting(nn.Module):
    """Chunks a symbolic batch, which the exporter cannot."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        one, two = torch.cat([images, images]).float().chunk(2)
        return {"logits": (one + two).permute(0, 3, 1, 2)}


def test_what_cannot_be_exported_says_so():
    with pytest.raises(WeaksegError, match="graph odd cannot be exported to ONNX .*slice instead of split"):
        onnx_from_graphs({"odd": Splitting()})


def test_another_network_is_caught(files, toy_graphs):
    other = toy_graphs(seed=1)
    for name, outputs in {"classifier": "scores|cam", "segmentation": "logits"}.items():
        with pytest.raises(
            ParityError, match=rf"graph {name}, output ({outputs}), images 1x48x64 .*at most 0.0001.*got"
        ):
            check(name, other[name], files[name], photos())


def test_a_slight_difference_is_caught(graphs, files):
    weight = graphs["segmentation"].model.head.weight
    with torch.no_grad():
        weight.mul_(1.001)
    try:
        with pytest.raises(ParityError, match="output logits"):
            check("segmentation", graphs["segmentation"], files["segmentation"], photos())
    finally:
        with torch.no_grad():
            weight.div_(1.001)


def test_another_form_is_caught(graphs, files):
    with pytest.raises(ParityError, match="expected the outputs .*logits.* got .*scores"):
        check("segmentation", graphs["segmentation"], files["classifier"], photos())


def test_cut_repeats_small_images():
    image = photos()[0]
    assert cut(image, 1, 2000).shape == (1, 2000, 3)
    np.testing.assert_array_equal(cut(image, 10, 12), image[:10, :12])
    assert {batch.shape[1:3] for batch in batches([image])} == {(48, 64), *EDGE_SIZES}
