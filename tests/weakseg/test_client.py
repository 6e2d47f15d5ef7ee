"""The typed clients against a real server."""

import asyncio
import contextlib
import gc
import io
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent import futures
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status
from PIL import Image

import weakseg
from serve.interceptors import status_from_error
from serve.repository import find_bundles
from weakseg import errors
from weakseg.channel import SERVICE, channel_options
from weakseg.client import AsyncClient, Client
from weakseg.image import upright
from weakseg.model import Model
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

LONG_S = 60.0
SEGMENT_CALLS = {
    "grpc_type": "unary_unary",
    "grpc_service": "weakseg.v1.SegmentationService",
    "grpc_method": "Segment",
}
EVERYTHING = ("segmentation", "pseudo_mask", "cam")


@pytest.fixture(scope="module")
def client(shared_serving):
    with Client(shared_serving.target) as client:
        yield client


def run(shared_serving, use, **options):
    """Run `use(client)` with an AsyncClient in a loop of its own."""

    async def main():
        async with AsyncClient(shared_serving.target, **options) as client:
            return await use(client)

    return asyncio.run(asyncio.wait_for(main(), LONG_S))


def same(result, expected, atol=0.0):
    """Assert that two results say the same."""
    for name in ("segmentation", "pseudo_mask"):
        got, want = getattr(result, name), getattr(expected, name)
        assert (got is None) == (want is None)
        if want is not None:
            np.testing.assert_array_equal(got, want)
            assert got.dtype == want.dtype
    assert list(result.heatmaps) == list(expected.heatmaps)
    for name, heatmap in expected.heatmaps.items():
        np.testing.assert_allclose(result.heatmaps[name], heatmap, atol=atol, rtol=0)
    for field in ("classes", "height", "width", "scores", "present", "model", "model_sha256", "quality"):
        assert getattr(result, field) == getattr(expected, field), field
    np.testing.assert_array_equal(result.palette, expected.palette)
    if expected.threshold is not None:
        assert (result.threshold.t, result.threshold.rule) == (expected.threshold.t, expected.threshold.rule)


@pytest.mark.parametrize("mask_encoding", ["png", "rle", "raw", "polygon"])
def test_a_served_result_is_the_offline_result(client, model, colours, png, mask_encoding):
    data = png(colours)
    served = client.segment(data, outputs=EVERYTHING, mask_encoding=mask_encoding, heatmap_encoding="f32")
    expected = model.segment(data, outputs=EVERYTHING)
    same(served, expected)
    assert served.refinement == (expected.refinement if mask_encoding == "png" else {}), "only a PNG has room for it"


def test_an_async_result_too(shared_serving, model, colours, png):
    served = run(shared_serving, lambda client: client.segment(png(colours), outputs=EVERYTHING))
    same(served, model.segment(colours, outputs=EVERYTHING), atol=5e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"tags": ["blue", "red"]},
        {"tags": []},
        {"threshold": 0.2},
        {"refine": True},
        {"threshold": 0.3, "refine": False, "tags": ["green"]},
        {"heatmap_max_side": 7},
        {"quality": True},
        {"quality": True, "refine": True},
        {"quality": True, "tags": []},
    ],
    ids=str,
)
def test_options_mean_what_they_mean_offline(client, model, colours, options):
    expected = model.segment(colours, outputs=EVERYTHING, **options)
    served = client.segment(colours, outputs=EVERYTHING, heatmap_encoding="f32", **options)
    same(served, expected)
    assert (served.threshold, served.refinement) == (expected.threshold, expected.refinement)


def test_without_outputs_it_is_the_segmentation(client, model, colours):
    same(client.segment(colours), model.segment(colours))


def test_heatmaps_of_chosen_classes(client, colours):
    assert list(client.segment(colours, outputs=("cam",), heatmap_classes=["blue"]).heatmaps) == ["blue"]


def sources(colours, png, folder):
    files = {}
    for suffix in ("png", "bmp", "gif", "tiff"):
        files[suffix] = folder / f"image.{suffix}"
        Image.fromarray(colours).save(files[suffix])
    return {
        "bytes": png(colours),
        "path": files["png"],
        "text": str(files["png"]),
        "array": colours,
        "read-only array": np.frombuffer(colours.tobytes(), np.uint8).reshape(colours.shape),
        "strided array": np.concatenate([colours, colours], axis=2)[..., :3],
        "Pillow": Image.fromarray(colours),
        "BMP": files["bmp"],
        "TIFF": files["tiff"],
    }


def test_every_kind_of_image(client, model, colours, png, tmp_path):
    expected = model.segment(colours)
    for source in sources(colours, png, tmp_path).values():
        same(client.segment(source), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ignore", [True, False])
def test_orientation_is_that_of_the_offline_result(client, model, colours, ignore, orientation):
    """A PNG is turned by the server, a TIFF and a Pillow image by the client."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = {kind: io.BytesIO() for kind in ("PNG", "TIFF")}
    for kind, file in files.items():
        Image.fromarray(colours).save(file, kind, exif=exif)
    expected = model.segment(colours if ignore else upright(colours, orientation))
    pillow = Image.open(files["PNG"])
    for source in (files["PNG"].getvalue(), files["TIFF"].getvalue(), pillow):
        served = client.segment(source, ignore_orientation=ignore)
        same(served, expected)
        same(model.segment(source, ignore_orientation=ignore), expected)
        if served.image is not None:
            np.testing.assert_array_equal(served.image, expected.image)
    (streamed,) = client.segment_many([pillow], ignore_orientation=ignore)
    same(streamed, expected)


def test_reduced_decoding_is_that_of_the_offline_result(client, shared_serving, model):
    coarse = np.random.default_rng(2).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((801, 599)).save(buffer, "JPEG")
    source = buffer.getvalue()
    expected = model.segment(source, reduced_decoding=True)
    assert (expected.mask != model.segment(source).mask).any(), "else this test would see nothing"
    same(client.segment(source, reduced_decoding=True), expected)
    (streamed,) = client.segment_many([source], reduced_decoding=True)
    same(streamed, expected)
    same(run(shared_serving, lambda client: client.segment(source, reduced_decoding=True)), expected)
    same(client.segment(source), model.segment(source))


def test_an_async_client_ignores_the_orientation_too(shared_serving, model, colours):
    pillow = Image.fromarray(colours)
    pillow.getexif()[0x0112] = 6
    assert run(shared_serving, lambda client: client.segment(pillow)).image.shape == (56, 40, 3)
    served = run(shared_serving, lambda client: client.segment(pillow, ignore_orientation=True))
    same(served, model.segment(colours))
    np.testing.assert_array_equal(served.image, colours)


def test_grey_pixels(client, model):
    grey = np.full((8, 8), 100, np.uint8)
    same(client.segment(grey), model.segment(grey))


def test_pixels_come_back_for_the_overlay_and_files_do_not(client, colours, png):
    assert client.segment(colours).overlay().size == (56, 40)
    with pytest.raises(errors.UsageError, match="pass overlay"):
        client.segment(png(colours)).overlay()


def test_times_of_every_stage(client, colours):
    assert client.segment(colours).seconds.keys() == {"queue", "decode", "infer", "postprocess", "encode"}


# Streams --------------------------------------------------------------------------------------------------------------


def stripes(n):
    """n images that all differ."""
    images = []
    for i in range(n):
        image = np.full((16, 64, 3), 128, np.uint8)
        image[:, : 4 * (i + 1)] = [255, 0, 0]
        images.append(image)
    return images


@pytest.mark.parametrize("in_flight", [1, 3, 8])
def test_many_images_come_back_in_order(client, model, in_flight):
    images = stripes(12)
    results = list(client.segment_many(iter(images), in_flight=in_flight))
    assert len(results) == 12
    for result, image in zip(results, images, strict=True):
        same(result, model.segment(image))


def test_many_images_come_back_in_order_async(shared_serving, model):
    images = stripes(12)

    async def use(client):
        return [result async for result in client.segment_many(iter(images), in_flight=3)]

    for result, image in zip(run(shared_serving, use), images, strict=True):
        same(result, model.segment(image))


@pytest.mark.parametrize("in_flight", [1, 2])
def test_errors_stand_among_the_results(client, png, colours, in_flight):
    good = png(colours)
    images = ["missing.jpg", "missing.png", b"hello", good, good[:90], good, "missing.jpg"]
    results = list(client.segment_many(images, in_flight=in_flight, on_error="return"))
    expected = [errors.ImageError] * 3 + [weakseg.Result, errors.ImageError, weakseg.Result, errors.ImageError]
    assert [type(result) for result in results] == expected
    assert "missing.png" in str(results[1])


def test_errors_stand_among_the_results_async(shared_serving, png, colours):
    good = png(colours)

    async def use(client):
        images = ["missing.jpg", "missing.png", good, good[:90], good]
        return [type(r) async for r in client.segment_many(images, in_flight=1, on_error="return")]

    expected = [errors.ImageError] * 2 + [weakseg.Result, errors.ImageError, weakseg.Result]
    assert run(shared_serving, use) == expected


def test_the_first_error_ends_the_stream(client, png, colours):
    results = client.segment_many([png(colours), b"hello", png(colours)], in_flight=1)
    assert next(results).mask.shape == (40, 56)
    with pytest.raises(errors.ImageError):
        next(results)


def test_a_stream_may_be_left_early_and_images_are_read_lazily(client):
    read = []

    def images():
        for image in stripes(100):
            read.append(1)
            yield image

    list(client.segment_many(stripes(8)))  # the server has the threads that it wants
    before = threading.enumerate()
    results = client.segment_many(images(), in_flight=2)
    next(results)
    results.close()
    for thread in set(threading.enumerate()) - set(before):
        thread.join(LONG_S)
    assert len(read) <= 4


def test_streams_left_early_leave_nothing_behind(serving, caplog):
    running = serving()
    with Client(running.target) as client:
        for n_read in range(10):
            results = client.segment_many(stripes(15), in_flight=4)
            for _ in range(n_read):
                next(results)
            results.close()
    running.until(lambda: running.server.admission.inflight == 0)
    labels = {"grpc_type": "stream_stream", "grpc_service": "weakseg.v1.SegmentationService"}
    assert running.sample("grpc_server_started_total", grpc_method="SegmentStream", **labels) > 0
    assert running.sample("grpc_server_handled_total", grpc_method="SegmentStream", grpc_code="INTERNAL", **labels) == 0
    assert not [record for record in caplog.records if record.name == "serve.errors"]


def test_no_images(client, shared_serving):
    assert list(client.segment_many([])) == []

    async def use(client):
        return [result async for result in client.segment_many([])]

    assert run(shared_serving, use) == []


def windowed(images, in_flight, counts):
    """The images, and how many were ever read and not given back yet."""
    for image in images:
        counts["read"] += 1
        counts["most"] = max(counts["most"], counts["read"] - counts["got"])
        yield image


@pytest.mark.parametrize("method", ["segment_many", "segment_unordered"])
def test_thousands_of_images_pass_through_a_small_window(client, method):
    counts = Counter()
    images = windowed(itertools.repeat(np.zeros((4, 4, 3), np.uint8), 2000), 4, counts)
    indices = []
    for result in getattr(client, method)(images, in_flight=4):
        counts["got"] += 1
        index, _ = result if method == "segment_unordered" else (len(indices), result)
        indices.append(index)
    assert sorted(indices) == list(range(2000))
    assert counts["most"] <= 5 + 1, "four, the one that waits for a slot, and the one that the loop above counts late"


@pytest.mark.parametrize("method", ["segment_many", "segment_unordered"])
def test_thousands_of_images_pass_through_a_small_window_async(shared_serving, method):
    counts = Counter()
    images = windowed(itertools.repeat(np.zeros((4, 4, 3), np.uint8), 1000), 4, counts)

    async def use(client):
        async for _ in getattr(client, method)(images, in_flight=4):
            counts["got"] += 1

    run(shared_serving, use)
    assert counts["got"] == 1000 and counts["most"] <= 5


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_without_order_no_result_waits_for_a_slow_one(serving, monkeypatch, colours, kind):
    """The first image is decoded when three others are back."""
    running = serving(threads=2)
    images = [colours, *stripes(6)]
    first_may_go = threading.Event()

    decode = Model.decode

    def slow(self, image, **options):
        if image.shape == colours.shape:
            assert first_may_go.wait(LONG_S)
        return decode(self, image, **options)

    monkeypatch.setattr(Model, "decode", slow)
    got = []

    def take(pair):
        got.append(pair[0])
        if len(got) == 3:
            first_may_go.set()

    if kind is Client:
        with Client(running.target) as client:
            for pair in client.segment_unordered(images, in_flight=8):
                take(pair)
    else:

        async def use(client):
            async for pair in client.segment_unordered(images, in_flight=8):
                take(pair)

        run(running, use)
    assert sorted(got) == list(range(7)) and 0 not in got[:3]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_errors_without_order_stand_beside_their_index(shared_serving, client, model, png, colours, kind):
    good = png(colours)
    images = ["missing.jpg", good, b"hello", good[:90], good, "missing.png"]

    async def use(client):
        return [pair async for pair in client.segment_unordered(images, in_flight=2)]

    pairs = list(client.segment_unordered(images, in_flight=2)) if kind is Client else run(shared_serving, use)
    assert len(pairs) == 6
    by_index = dict(pairs)
    for index, image in enumerate(images):
        if image is good:
            same(by_index[index], model.segment(good))
        else:
            assert isinstance(by_index[index], errors.ImageError)
    assert "missing.png" in str(by_index[5])


def test_a_folder_that_is_not_there_is_told_at_its_first_image(client):
    read = []

    def images():
        for index in range(1000):
            read.append(index)
            yield f"missing/{index}.jpg"

    with pytest.raises(errors.ImageError, match="missing/0"):
        next(client.segment_many(images(), in_flight=4))
    assert len(read) <= 6


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_errors_that_are_collected_hold_no_images(shared_serving, client, kind):
    held = []

    def images():
        for _ in range(20):
            wrong = np.zeros((50, 50, 3))  # floats
            held.append(weakref.ref(wrong))
            yield wrong

    async def use(client):
        return [error async for _, error in client.segment_unordered(images(), in_flight=2)]

    if kind is Client:
        collected = [error for _, error in client.segment_unordered(images(), in_flight=2)]
    else:
        collected = run(shared_serving, use)
    assert all(isinstance(error, errors.WeaksegError) and error.__traceback__ is None for error in collected)
    gc.collect()
    assert len(held) == 20 and not any(ref() is not None for ref in held)


@pytest.mark.parametrize("method", ["segment_many", "segment_unordered"])
def test_what_the_images_raise_is_raised(client, shared_serving, method):
    def images():
        yield from stripes(3)
        raise KeyError("broken loader")

    with pytest.raises(KeyError, match="broken loader"):
        list(getattr(client, method)(images(), in_flight=2))

    async def use(client):
        return [result async for result in getattr(client, method)(images(), in_flight=2)]

    with pytest.raises(KeyError, match="broken loader"):
        run(shared_serving, use)


@pytest.mark.parametrize("method", ["segment_many", "segment_unordered"])
def test_a_consumer_that_stops_early_ends_the_stream(serving, method):
    """The server has nothing left of it, and the client neither thread nor task."""
    running = serving()
    with Client(running.target) as client:
        results = getattr(client, method)(stripes(100), in_flight=4)
        next(results)
        results.close()
        for thread in threading.enumerate():
            if "(receive)" in thread.name:
                thread.join(LONG_S)
                assert not thread.is_alive()

    async def use(client):
        before = asyncio.all_tasks()
        results = getattr(client, method)(stripes(100), in_flight=4)
        await anext(results)
        await results.aclose()
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0.001)

    run(running, use)
    running.until(lambda: running.server._edge.running == 0 and running.server.admission.inflight == 0)


def test_a_server_that_dies_ends_the_stream_with_an_error(serving, colours):
    running = serving()
    running.runner.gate.clear()
    with Client(running.target) as client:
        results = client.segment_unordered([colours] * 10, in_flight=4)
        dying = threading.Timer(0.2, lambda: running.call(running.server._grpc.stop(0)))
        dying.start()
        with pytest.raises(errors.ServiceError):
            list(results)
        dying.join(LONG_S)


@pytest.mark.parametrize("options", [{"in_flight": 0}, {"on_error": "ignore"}])
def test_wrong_stream_options(client, options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        next(client.segment_many([], **options))


# Models ---------------------------------------------------------------------------------------------------------------


def test_what_the_server_says_about_its_models(client, model, shared_serving):
    info = client.model()
    assert (info.id, info.state, info.sha256) == ("toy/1", "ready", model.bundle.sha256)
    assert info.classes == model.classes
    assert set(info.outputs) == set(EVERYTHING)
    assert info.refinements == model.refinements == ("none", "crf")  # the toy bundle has no graph for a walk
    assert (info.max_side, info.presence, info.provider) == (64, 0.5, "CPUExecutionProvider")
    assert [info.id for info in client.models()] == ["toy/1"]
    assert run(shared_serving, lambda client: client.model()).id == "toy/1"
    assert [info.id for info in run(shared_serving, lambda client: client.models())] == ["toy/1"]


def test_a_server_without_the_packages_says_what_it_cannot_refine_by(client, colours, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert client.model().refinements == ("none",)
    assert client.segment(colours, outputs=("pseudo_mask",), refine="none").refined_by == "none"
    with pytest.raises(errors.OutputUnsupportedError, match=r"toy/1 cannot be refined by crf here, only by none"):
        client.segment(colours, outputs=("pseudo_mask",), refine="crf")


def test_all_pages_of_models(serving, toy_bundle):
    from serve.repository import BundleFolder

    running = serving(folders=[BundleFolder("toy", str(i), toy_bundle) for i in range(105)], load=lambda path: 1 / 0)
    with Client(running.target) as client:
        assert [info.version for info in client.models()] == [str(i) for i in range(105)]


def test_a_version_can_be_asked_for(serving, toy_bundle, colours):
    from serve.repository import BundleFolder

    running = serving(folders=[BundleFolder("toy", version, toy_bundle) for version in ("1", "2")])
    for asked, version in ((None, "2"), ("toy", "2"), ("toy/1", "1")):
        with Client(running.target, model=asked) as client:
            assert client.model().version == version
            client.segment(colours)
        assert running.sample("weakseg_requests_total", model="toy", version=version, code="OK") > 0
    with (
        Client(running.target, model="toy/3") as client,
        pytest.raises(errors.ModelNotFoundError, match="there is 1, 2"),
    ):
        client.segment(colours)


def test_a_newer_version_is_found_when_the_known_one_is_gone(serving, colours):
    running = serving()
    with Client(running.target) as client, Client(running.target, model="toy/1") as pinned:
        client.segment(colours)
        pinned.segment(colours)
        (entry,) = running.server.models.entries()
        entry.folder = replace(entry.folder, version="2")
        client.segment(colours)
        with pytest.raises(errors.ModelNotFoundError):
            pinned.segment(colours)


def test_a_label_is_followed_when_the_version_it_named_is_gone(serving, toy_bundle, colours, tmp_path):
    for version in ("1", "2"):
        folder = shutil.copytree(toy_bundle, tmp_path / "toy" / version)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"version": version}))
    labels = tmp_path / "toy" / "labels.toml"
    labels.write_text('stable = "1"\n')
    running = serving(folders=lambda: find_bundles([], tmp_path))
    with Client(running.target, model="toy/stable") as client, Client(running.target, model="toy/1") as pinned:
        assert client.segment(colours).model == pinned.segment(colours).model == "toy/1"
        labels.write_text('stable = "2"\n')
        running.call(running.server.lifecycle.reload())
        assert client.segment(colours).model == "toy/1", "masks of one job are of one version"
        running.call(running.server.lifecycle.unload("toy", "1", force=False))
        assert client.segment(colours).model == "toy/2"
        with pytest.raises(errors.ModelNotFoundError):
            pinned.segment(colours)


@pytest.mark.parametrize("n_old", [1, 2])
def test_while_servers_are_updated_each_call_finds_one_that_has_its_version(serving, toy_bundle, colours, n_old):
    """In turns, so that a client that asks in a fixed order would meet the wrong one each time."""
    from serve.repository import BundleFolder

    versions = ["1"] * n_old + ["2"] * (3 - n_old)
    running = [serving(folders=[BundleFolder("toy", version, toy_bundle)]) for version in versions]
    target = "ipv4:" + ",".join(one.target for one in running)

    async def in_a_loop():
        async with AsyncClient(target) as client:
            return {(await client.segment(colours)).model for _ in range(20)}

    with Client(target) as client:
        models = {client.segment(colours).model for _ in range(20)}
    assert models | asyncio.run(in_a_loop()) <= {"toy/1", "toy/2"}
    asked = [one.sample("grpc_server_handled_total", **SEGMENT_CALLS, grpc_code="NOT_FOUND") for one in running]
    assert sum(asked) > 0, "they met servers without their version"
    with Client(target, model="toy/3", timeout_s=1.0) as client, pytest.raises(errors.ModelNotFoundError):
        client.segment(colours)


def test_callers_of_one_client_do_not_disturb_each_other_while_servers_are_updated(serving, toy_bundle, colours):
    from serve.repository import BundleFolder

    running = [serving(folders=[BundleFolder("toy", version, toy_bundle)]) for version in ("1", "2")]

    async def at_once():
        async with AsyncClient("ipv4:" + ",".join(one.target for one in running)) as client:
            return await asyncio.gather(*(client.segment(colours) for _ in range(60)))

    assert {result.model for result in asyncio.run(at_once())} <= {"toy/1", "toy/2"}


def test_a_call_that_a_server_drops_as_it_stops_is_asked_again():
    """gRPC ends so what it has received and given to no handler."""
    n_calls = itertools.count()

    def get_model(request, context):
        if next(n_calls) == 0:
            context.abort(grpc.StatusCode.CANCELLED, "")
        return pb.GetModelResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    handler = grpc.unary_unary_rpc_method_handler(
        get_model, pb.GetModelRequest.FromString, pb.GetModelResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"GetModel": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", channel_options(2**20)) as channel:
        pb_grpc.SegmentationServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=LONG_S)
    assert next(n_calls) == 2
    server.stop(None).wait()


def test_a_model_replaced_under_its_name_is_noticed(serving, colours):
    running = serving()
    with Client(running.target) as client:
        client.segment(colours)
        (entry,) = running.server.models.entries()
        entry.model.bundle = replace(entry.model.bundle, sha256="0" * 64)
        with pytest.raises(errors.ServiceError, match="was replaced"):
            client.segment(colours)
        client.segment(colours)


def test_a_model_that_loads_or_failed(serving, toy_bundle):
    may_load = threading.Event()

    def load(path):
        assert may_load.wait(LONG_S)
        raise errors.BundleError("damaged: copy it again")

    running = serving(load=load, wait_loaded=False)
    with Client(running.target) as client:
        with pytest.raises(errors.ModelLoadingError):
            client.segment(np.zeros((1, 1, 3), np.uint8))
        may_load.set()
        running.call(running.server.wait_loaded())
        with pytest.raises(errors.ModelFailedError, match="damaged"):
            client.segment(np.zeros((1, 1, 3), np.uint8))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"tags": ["dog"]}, errors.UnknownClassError, "unknown class 'dog'"),
        ({"tags": "red"}, errors.UnknownClassError, "a list"),
        ({"outputs": ("mask",)}, errors.ConfigError, "outputs must be some of"),
        ({"outputs": "cam"}, errors.ConfigError, "outputs must be some of"),
        ({"mask_encoding": "jpeg"}, errors.ConfigError, "png, rle, raw, polygon"),
        ({"outputs": ("cam",), "heatmap_encoding": "jpeg"}, errors.ConfigError, "png, f16, f32"),
        ({"treshold": 0.5}, errors.ConfigError, "treshold"),
        ({"outputs": ("pseudo_mask",), "threshold": 2.0}, errors.InvalidRequestError, "from 0.001 to 0.999"),
    ],
    ids=str,
)
def test_wrong_options(client, colours, options, kind, message):
    with pytest.raises(kind, match=message):
        client.segment(colours, **options)


def test_the_field_of_an_invalid_request(client, colours):
    with pytest.raises(errors.InvalidRequestError) as raised:
        client.segment(colours, request_id="x" * 129)
    assert raised.value.field == "request_id"


def test_no_server():
    with Client("127.0.0.1:1") as client, pytest.raises(errors.ServiceError, match="no server answers") as raised:
        client.model()
    assert raised.value.reason == "UNAVAILABLE"


def test_a_server_of_something_else():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client, pytest.raises(errors.ServiceError, match="no weakseg server"):
            client.models()
    finally:
        server.stop(None).wait()


def test_no_answer_in_time(serving, colours):
    running = serving()
    running.runner.gate.clear()
    with Client(running.target) as client, pytest.raises(errors.DeadlineTooShortError, match="timeout_s"):
        client.segment(colours, timeout_s=0.2)


def test_an_image_above_the_clients_own_limit(shared_serving):
    with (
        Client(shared_serving.target, max_message_bytes=5000) as client,
        pytest.raises(errors.ImageError) as raised,
    ):
        client.segment(np.zeros((50, 50, 3), np.uint8))
    assert raised.value.reason == "IMAGE_TOO_LARGE"


def test_a_response_above_the_clients_own_limit(shared_serving, png):
    with Client(shared_serving.target, max_message_bytes=5000) as client:
        image = png(np.zeros((100, 100, 3), np.uint8))
        assert client.segment(image).mask.shape == (100, 100)
        with pytest.raises(errors.ResponseTooLargeError, match="raise max_message_bytes"):
            client.segment(image, mask_encoding="raw")


class Flaky(pb_grpc.SegmentationServiceServicer):
    """UNAVAILABLE until the n-th call."""

    def __init__(self, n):
        self.n, self.calls = n, 0

    def ListModels(self, request, context):  # noqa: N802
        self.calls += 1
        if self.calls < self.n:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return pb.ListModelsResponse()

    def Segment(self, request, context):  # noqa: N802
        self.calls += 1
        if self.calls < self.n:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return pb.SegmentResponse()


@contextlib.contextmanager
def flaky(n):
    servicer = Flaky(n)
    server = grpc.server(futures.ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", -1)])
    pb_grpc.add_SegmentationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield servicer, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_unavailable_is_tried_again():
    with flaky(4) as (servicer, target), Client(target) as client:
        assert client.models() == []
        assert servicer.calls == 4


def test_also_with_photographs_above_grpcs_own_buffer():
    with flaky(3) as (servicer, target), Client(target) as client:
        client._stub.Segment(pb.SegmentRequest(image=pb.Image(encoded=bytes(3 * 2**20))), timeout=LONG_S)
        assert servicer.calls == 3


def test_unavailable_is_not_tried_for_ever():
    with flaky(100) as (servicer, target), Client(target) as client:
        with pytest.raises(errors.ServiceError):
            client.models()
        assert servicer.calls == 4


def test_calls_go_round_all_addresses_of_a_name(serving, colours):
    servers = [serving(), serving()]
    n_answered = [partial(one.sample, "weakseg_requests_total", model="toy", version="1", code="OK") for one in servers]
    with Client("ipv4:" + ",".join(one.target for one in servers)) as client:
        give_up = time.monotonic() + LONG_S
        while not all(n() for n in n_answered):
            assert time.monotonic() < give_up, "one server is asked and never the other"
            client.segment(colours)
        before = [n() for n in n_answered]
        for _ in range(10):
            client.segment(colours)
        assert [n() - was for n, was in zip(n_answered, before, strict=True)] == [5, 5]
    with Client(f"dns:///localhost:{servers[0].server.port}") as client:
        client.segment(colours)


def test_where_all_servers_fail_most_calls_are_tried_once():
    with flaky(10**6) as (servicer, target), Client(target) as client:

        def call(_):
            with pytest.raises(errors.ServiceError):
                client.models()

        with futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(call, range(60)))
        assert 60 < servicer.calls <= 60 + 50


def test_the_example(shared_serving, colours, tmp_path):
    Image.fromarray(colours).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    example = Path(__file__).parents[2] / "examples" / "client.py"
    args = [sys.executable, str(example), shared_serving.target, "a.png", "b.png"]
    done = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, timeout=LONG_S, check=True)
    assert "toy/1 on CPUExecutionProvider: red, green, blue" in done.stdout
    assert "a.png: red, green, blue" in done.stdout
    assert "b.png: expected" in done.stderr
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a-mask.png", "a-overlay.png"]


class Busy(pb_grpc.SegmentationServiceServicer):
    """Refuses so many calls as a busy server does, then answers."""

    def __init__(self, refusals, retry_s):
        self.refusals, self.retry_s, self.n_calls = refusals, retry_s, 0

    def ListModels(self, request, context):  # noqa: N802
        self.n_calls += 1
        if self.n_calls <= self.refusals:
            error = errors.QueueFullError("full")
            error.retry_s = self.retry_s
            status = rpc_status.to_status(status_from_error(error))
            context.abort_with_status(status)
        return pb.ListModelsResponse()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("refusals", "retry_s", "timeout_s", "n_calls"),
    [(3, 0.01, 30.0, 4), (4, 0.01, 30.0, 4), (1, 100.0, 1.0, 1)],
    ids=["tried until it answers", "given up", "longer than there is time"],
)
async def test_a_busy_server_is_asked_again_when_it_said(refusals, retry_s, timeout_s, n_calls, kind):
    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = Busy(refusals, retry_s)
    pb_grpc.add_SegmentationServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()

    async def models():
        if kind is Client:
            with Client(f"127.0.0.1:{port}", timeout_s=timeout_s) as client:
                return await asyncio.to_thread(client.models)
        async with AsyncClient(f"127.0.0.1:{port}", timeout_s=timeout_s) as client:
            return await client.models()

    try:
        if refusals < n_calls:
            assert await models() == []
        else:
            with pytest.raises(errors.QueueFullError) as raised:
                await models()
            assert raised.value.retry_s == retry_s
    finally:
        server.stop(None).wait()
    assert servicer.n_calls == n_calls
