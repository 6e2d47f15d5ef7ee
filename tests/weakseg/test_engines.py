import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from weakseg.engines import (
    EngineRecord,
    Platform,
    Profile,
    cache_folder,
    engine_path,
    read_engine,
    sha256_of,
    write_engine,
)
from weakseg.errors import BundleError, ConfigError

L4 = Platform("tensorrt", "11.4.0.106", "NVIDIA L4", "8.9")
PLAN = b"machine code"
RECORD = EngineRecord(
    "toy/1",
    "classifier",
    "fp32",
    L4,
    Profile((1, 1, 1, 3), (8, 384, 512, 3), (8, 512, 512, 3)),
    hashlib.sha256(PLAN).hexdigest(),
    {"cam": 1e-6},
)


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "toy" / "classifier.onnx"
    path.parent.mkdir()
    path.write_bytes(b"a graph")
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_the_cache_is_where_it_is_told_to_be():
    assert cache_folder({"WEAKSEG_ENGINE_CACHE": "/var/engines", "XDG_CACHE_HOME": "/x"}) == Path("/var/engines")
    assert cache_folder({"WEAKSEG_ENGINE_CACHE": "", "XDG_CACHE_HOME": "/x"}) == Path("/x/weakseg/engines")
    assert cache_folder({}) == Path.home() / ".cache/weakseg/engines"


def test_an_engine_is_found_by_its_graph_and_its_machine(graph, cache):
    path = write_engine(cache, graph, RECORD, PLAN)
    assert path == cache / sha256_of(graph) / "tensorrt-11.4.0.106-sm89-nvidia-l4.plan"
    assert read_engine(cache, "classifier", graph, L4) == (RECORD, PLAN)
    moved = graph.rename(graph.with_name("renamed.onnx"))
    assert read_engine(cache, "classifier", moved, L4) == (RECORD, PLAN)


def test_an_engine_replaces_the_one_before(graph, cache):
    write_engine(cache, graph, RECORD, PLAN)
    other = replace(RECORD, sha256=hashlib.sha256(b"other").hexdigest())
    write_engine(cache, graph, other, b"other")
    assert read_engine(cache, "classifier", graph, L4) == (other, b"other")


@pytest.mark.parametrize(
    "here",
    [
        replace(L4, library="tensorrt_rtx"),
        replace(L4, version="10.16.1.11"),
        replace(L4, gpu="NVIDIA H200", compute_capability="9.0"),
    ],
)
def test_another_machine_needs_another_engine(graph, cache, here):
    write_engine(cache, graph, RECORD, PLAN)
    with pytest.raises(ConfigError) as caught:
        read_engine(cache, "classifier", graph, here)
    target = here.library.replace("_", "-")
    assert str(caught.value) == (
        f"no engine of graph classifier ({graph}) for {here} in {cache}, only for NVIDIA L4 (compute capability 8.9), "
        f'tensorrt 11.4.0.106: build it here with `weakseg export --target {target} "{graph.parent}"` and the '
        "precision that you load"
    )


def test_another_graph_needs_another_engine(graph, cache):
    write_engine(cache, graph, RECORD, PLAN)
    graph.write_bytes(b"another graph")
    with pytest.raises(ConfigError, match="no engine of graph classifier .* in .*cache: build it here with"):
        read_engine(cache, "classifier", graph, L4)


def test_an_engine_of_unknown_hash_is_never_loaded(graph, cache):
    path = write_engine(cache, graph, RECORD, PLAN)
    path.write_bytes(b"planted")
    with pytest.raises(BundleError, match=r"is not the engine that was built .*: expected sha256 .*, got .*: build it"):
        read_engine(cache, "classifier", graph, L4)
    path.with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match="no engine of graph classifier"):
        read_engine(cache, "classifier", graph, L4)


def test_a_record_of_another_machine_under_this_name(graph, cache):
    path = write_engine(cache, graph, RECORD, PLAN)
    record = json.loads(path.with_suffix(".json").read_bytes())
    record["platform"]["gpu"] = "NVIDIA A100"
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(BundleError, match="of an engine for NVIDIA A100"):
        read_engine(cache, "classifier", graph, L4)


@pytest.mark.parametrize("text", ["", "[]", '{"model": 1}'])
def test_a_damaged_record(graph, cache, text):
    path = write_engine(cache, graph, RECORD, PLAN)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(BundleError, match="expected the record of an engine, got .*: remove it and build again"):
        read_engine(cache, "classifier", graph, L4)


def test_a_plan_that_is_gone(graph, cache):
    write_engine(cache, graph, RECORD, PLAN).unlink()
    with pytest.raises(BundleError, match="cannot read .*plan: No such file"):
        read_engine(cache, "classifier", graph, L4)


def test_a_cache_that_cannot_be_written(graph, cache):
    cache.write_bytes(b"a file")
    with pytest.raises(ConfigError, match="cannot write the engine .*: set WEAKSEG_ENGINE_CACHE to a folder"):
        write_engine(cache, graph, RECORD, PLAN)
    assert not engine_path(cache, graph, L4).exists()
