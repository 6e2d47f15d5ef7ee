"""The service over the wire: a real server, real graphs, the generated stub."""

import contextlib
import io
import json
import shutil
import threading
import time

import grpc
import numpy as np
import pytest
from PIL import Image

import serve.job
import serve.pipeline
import serve.service
import serve.steps
import serve.visit
from serve.pace import LATEST, LEAST
from serve.repository import find_bundles
from weakseg.cam import alpha_from_threshold
from weakseg.classes import ClassTable
from weakseg.model import Model
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc
from weakseg.wire import cam01_from_heatmap, labels_from_mask

LONG_S = 60.0
CLASSES = ClassTable(("red", "green", "blue"))


@contextlib.contextmanager
def stub_of(serving):
    with grpc.insecure_channel(serving.target) as channel:
        yield pb_grpc.SegmentationServiceStub(channel)


@pytest.fixture(scope="module")
def stub(shared_serving):
    with stub_of(shared_serving) as stub:
        yield stub


def request(data, *specs, **fields):
    specs = specs or (pb.OutputSpec(kind=pb.OUTPUT_KIND_SEGMENTATION),)
    return pb.SegmentRequest(image=pb.Image(encoded=data), outputs=specs, **fields)


def spec(kind, **fields):
    return pb.OutputSpec(kind=getattr(pb, f"OUTPUT_KIND_{kind}"), **fields)


@pytest.mark.parametrize("encoding", ["UNSPECIFIED", "PNG_INDEX", "COCO_RLE", "POLYGON", "RAW_U8", "RAW_U16"])
@pytest.mark.parametrize("kind", ["SEGMENTATION", "PSEUDO_MASK"])
def test_a_served_mask_is_the_offline_mask(stub, model, colours, png, kind, encoding):
    asked = spec(kind, mask_encoding=getattr(pb, f"MASK_ENCODING_{encoding}"))
    mask = stub.Segment(request(png(colours), asked)).outputs[0].mask
    expected = model.segment(colours, outputs=(kind.lower(),)).mask
    np.testing.assert_array_equal(labels_from_mask(mask, CLASSES), expected)
    assert len(np.unique(expected)) >= 4, "the picture must show something"
    assert mask.encoding == asked.mask_encoding or encoding == "UNSPECIFIED"


@pytest.mark.parametrize("kind", ["SEGMENTATION", "PSEUDO_MASK"])
def test_polygons_with_a_tolerance_have_fewer_points_and_the_same_mask(stub, png, kind):
    rows, columns = np.ogrid[:60, :60]
    image = np.full((60, 60, 3), 128, np.uint8)
    image[(rows - 28) ** 2 + (columns - 31) ** 2 < 24**2] = [255, 0, 0]
    asked = spec(kind, mask_encoding=pb.MASK_ENCODING_POLYGON)
    exact = stub.Segment(request(png(image), asked)).outputs[0].mask
    asked.polygon_tolerance = 0.5
    mask = stub.Segment(request(png(image), asked)).outputs[0].mask
    np.testing.assert_array_equal(labels_from_mask(mask, CLASSES), labels_from_mask(exact, CLASSES))
    assert sum(len(p.outer.xy) for p in mask.polygons) < 0.8 * sum(len(p.outer.xy) for p in exact.polygons)


@pytest.mark.parametrize("kind", ["SEGMENTATION", "PSEUDO_MASK"])
def test_quality_is_in_the_outputs_that_ask_for_it(stub, model, colours, png, kind):
    other = {"SEGMENTATION": "PSEUDO_MASK", "PSEUDO_MASK": "SEGMENTATION"}[kind]
    rated, plain = stub.Segment(request(png(colours), spec(kind, quality=True), spec(other))).outputs
    assert not plain.HasField("quality")
    expected = model.segment(colours, outputs=(kind.lower(),), quality=True).quality[kind.lower()]
    assert [(one.class_id, one.area_pixels, one.mean_confidence) for one in rated.quality.classes] == [
        (one.value, one.area_px, one.confidence) for one in expected.classes
    ]
    assert rated.quality.undecided_pixels == expected.undecided_px
    assert (rated.quality.mean_confidence, rated.quality.mean_entropy) == (expected.confidence, expected.entropy)
    assert rated.mask == stub.Segment(request(png(colours), spec(kind))).outputs[0].mask


def test_figures_without_a_meaning_are_not_set(stub, colours, png):
    asked = request(png(colours), spec("PSEUDO_MASK", quality=True), tags=pb.Tags())
    quality = stub.Segment(asked).outputs[0].quality
    assert [(one.class_id, one.area_pixels) for one in quality.classes] == [(0, 40 * 56)]
    assert not quality.HasField("mean_confidence") and not quality.HasField("mean_entropy")
    assert not quality.classes[0].HasField("mean_confidence")


def test_only_pseudo_masks_have_an_ignore_value_and_a_threshold(stub, colours, png):
    outputs = stub.Segment(request(png(colours), spec("SEGMENTATION"), spec("PSEUDO_MASK"))).outputs
    assert [output.mask.HasField("ignore_index") for output in outputs] == [False, True]
    assert outputs[1].mask.ignore_index == 255
    assert (outputs[1].threshold.value, outputs[1].threshold.rule) == (0.4, "fixed")
    assert not outputs[0].HasField("threshold")


@pytest.mark.parametrize(("encoding", "atol"), [("RAW_F32", 0), ("RAW_F16", 5e-4), ("PNG_GRAY8", 0.5 / 255 + 1e-6)])
def test_heatmaps(stub, model, colours, png, encoding, atol):
    asked = spec("CAM", heatmap_encoding=getattr(pb, f"HEATMAP_ENCODING_{encoding}"))
    heatmaps = stub.Segment(request(png(colours), asked)).outputs[0].heatmaps.heatmaps
    expected = model.segment(colours, outputs=("cam",)).heatmaps
    assert [heatmap.class_id for heatmap in heatmaps] == [1, 2, 3]
    for heatmap, (_, cam01) in zip(heatmaps, expected.items(), strict=True):
        np.testing.assert_allclose(cam01_from_heatmap(heatmap), cam01, atol=atol, rtol=0)
        assert (heatmap.min_value, heatmap.max_value) == (cam01.min(), cam01.max())


def test_heatmaps_of_chosen_classes_scaled_down(stub, colours, png):
    asked = spec("CAM", class_ids=[3], heatmap_max_side=7)
    (heatmap,) = stub.Segment(request(png(colours), asked)).outputs[0].heatmaps.heatmaps
    assert (heatmap.class_id, heatmap.width, heatmap.height) == (3, 7, 5)


def test_outputs_come_in_the_order_they_were_asked_for(stub, colours, png):
    kinds = ["SEGMENTATION", "CAM", "PSEUDO_MASK"]
    response = stub.Segment(request(png(colours), *map(spec, kinds)))
    assert [pb.OutputKind.Name(output.kind) for output in response.outputs] == [f"OUTPUT_KIND_{k}" for k in kinds]


def test_what_a_response_says_about_itself(stub, model, colours, png):
    response = stub.Segment(request(png(colours), spec("CAM"), request_id="mine"))
    assert response.request_id == "mine"
    assert (response.model.name, response.model.version) == ("toy", "1")
    assert response.model_sha256 == model.bundle.sha256
    assert (response.image_width, response.image_height) == (56, 40)
    assert [(score.class_id, score.label, score.present) for score in response.scores] == [
        (1, "red", True),
        (2, "green", True),
        (3, "blue", True),
    ]
    assert response.timing.batch_size == 1
    for stage in ("queue", "decode", "infer", "postprocess", "encode"):
        assert 0 <= getattr(response.timing, stage).ToTimedelta().total_seconds() < LONG_S
    assert response.timing.infer.nanos > 0


def test_tags_decide_what_is_present(stub, model, colours, png):
    response = stub.Segment(request(png(colours), spec("PSEUDO_MASK"), tags=pb.Tags(class_ids=[3])))
    expected = model.segment(colours, outputs=("pseudo_mask",), tags=["blue"])
    np.testing.assert_array_equal(labels_from_mask(response.outputs[0].mask, CLASSES), expected.mask)
    assert [score.present for score in response.scores] == [False, False, True]


@pytest.mark.parametrize("refinement", ["NONE", "CRF"])
def test_threshold_and_refinement_of_the_request(stub, model, colours, png, refinement):
    asked = spec("PSEUDO_MASK", background_threshold=0.2, refinement=getattr(pb, f"REFINEMENT_{refinement}"))
    output = stub.Segment(request(png(colours), asked)).outputs[0]
    expected = model.segment(colours, outputs=("pseudo_mask",), threshold=0.2, refine=refinement == "CRF")
    np.testing.assert_array_equal(labels_from_mask(output.mask, CLASSES), expected.mask)
    assert (output.threshold.value, output.threshold.rule) == (0.2, "request")


def test_alpha_is_the_threshold_in_another_form(stub, colours, png):
    asked = spec("PSEUDO_MASK", background_alpha=alpha_from_threshold(0.2))
    assert stub.Segment(request(png(colours), asked)).outputs[0].threshold.value == pytest.approx(0.2, abs=1e-9)


def test_raw_pixels_give_what_a_file_gives(stub, colours, png):
    asked = (spec("SEGMENTATION"), spec("PSEUDO_MASK", refinement=pb.REFINEMENT_CRF))
    raw = pb.Image(raw=pb.RawImage(width=56, height=40, rgb=colours.tobytes()))
    from_raw = stub.Segment(pb.SegmentRequest(image=raw, outputs=asked))
    assert from_raw.outputs == stub.Segment(request(png(colours), *asked)).outputs


@pytest.mark.parametrize("options", [{"format": "JPEG", "quality": 95}, {"format": "WEBP", "lossless": True}])
def test_jpeg_and_webp(stub, model, colours, png, options):
    data = png(colours, **options)
    mask = stub.Segment(request(data)).outputs[0].mask
    np.testing.assert_array_equal(labels_from_mask(mask, CLASSES), model.segment(data).mask)


def test_masks_are_those_of_the_upright_image(stub, colours):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", exif=exif)
    response = stub.Segment(request(buffer.getvalue()))
    assert (response.image_width, response.image_height) == (40, 56)
    labels = labels_from_mask(response.outputs[0].mask, CLASSES)
    assert (labels[2, -3], labels[2, 2]) == (1, 2), "red was top left: it is top right now"


def test_masks_are_those_of_the_stored_image_where_the_orientation_is_ignored(stub, model, colours):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", exif=exif)
    asked = request(buffer.getvalue())
    asked.image.ignore_orientation = True
    response = stub.Segment(asked)
    assert (response.image_width, response.image_height) == (56, 40)
    np.testing.assert_array_equal(labels_from_mask(response.outputs[0].mask, CLASSES), model.segment(colours).mask)


def test_an_image_above_max_side_gets_a_mask_of_its_own_size(stub, model, png):
    image = np.full((90, 200, 3), 128, np.uint8)
    image[:, :100] = [255, 0, 0]
    mask = stub.Segment(request(png(image))).outputs[0].mask
    assert (mask.width, mask.height) == (200, 90)
    np.testing.assert_array_equal(labels_from_mask(mask, CLASSES), model.segment(image).mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_sizes(stub, png, shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[:] = [255, 0, 0]
    mask = stub.Segment(request(png(image))).outputs[0].mask
    assert (labels_from_mask(mask, CLASSES) == 1).all()
    assert (mask.height, mask.width) == shape


def test_a_stream_answers_every_image_and_goes_on_after_errors(stub, colours, png):
    data = png(colours)
    images = [data, b"no image", data, data[:60], data]
    responses = list(
        stub.SegmentStream(pb.SegmentStreamRequest(request=request(d, request_id=str(i))) for i, d in enumerate(images))
    )
    by_id = {response.request_id: response for response in responses}
    assert sorted(by_id) == ["0", "1", "2", "3", "4"]
    assert [by_id[str(i)].WhichOneof("result") for i in range(5)] == [
        "response",
        "error",
        "response",
        "error",
        "response",
    ]
    assert by_id["1"].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    single = stub.Segment(request(data, request_id="4"))
    assert by_id["4"].response.outputs == single.outputs


def test_a_stream_reads_ahead_only_so_far(serving, colours, png):
    running = serving(stream_in_flight=3, max_batch=1)
    running.runner.gate.clear()
    inflight = []
    running.server.metrics.inflight.set = inflight.append
    requests = [pb.SegmentStreamRequest(request=request(png(colours), request_id=str(i))) for i in range(8)]
    with stub_of(running) as stub:
        responses = stub.SegmentStream(iter(requests))
        running.until(lambda: running.server.admission.inflight == 3)
        running.runner.gate.set()
        assert len(list(responses)) == 8
    assert max(inflight) == 3


def test_get_model(stub, shared_serving, model):
    found = stub.GetModel(pb.GetModelRequest()).model
    assert (found.ref.name, found.ref.version, found.state) == ("toy", "1", pb.MODEL_STATE_READY)
    assert found.sha256 == model.bundle.sha256
    assert [(info.id, info.name) for info in found.classes] == list(enumerate(["background", "red", "green", "blue"]))
    assert [info.rgb for info in found.classes] == [0x000000, 0x800000, 0x008000, 0x808000]
    assert set(found.output_kinds) == {1, 2, 3}
    assert found.execution_provider == "CPUExecutionProvider"
    assert (found.max_batch_size, found.max_message_bytes) == (8, 32 * 2**20)
    assert (found.max_side, found.refuses_larger, found.presence_threshold) == (64, False, 0.5)
    assert found.max_image_pixels == shared_serving.server.config.max_pixels
    assert found.loaded_at.seconds > 0


def test_list_models_in_pages(serving, toy_bundle):
    from serve.repository import BundleFolder

    folders = [BundleFolder(name, version, toy_bundle) for name in "ba" for version in ("2", "10", "1")]
    with stub_of(serving(folders=folders)) as stub:
        names, token = [], ""
        for expected_size in (4, 2):
            page = stub.ListModels(pb.ListModelsRequest(page_size=4, page_token=token))
            assert len(page.models) == expected_size
            names += [f"{model.ref.name}/{model.ref.version}" for model in page.models]
            token = page.next_page_token
        assert names == ["a/1", "a/2", "a/10", "b/1", "b/2", "b/10"]
        assert token == ""
        assert len(stub.ListModels(pb.ListModelsRequest()).models) == 6


def test_waiting_images_share_a_batch_and_the_masks_stay_the_same(serving, model, colours, png):
    running = serving(max_batch=4)
    images = [np.roll(colours, 4 * i, axis=1) for i in range(5)]
    running.runner.gate.clear()
    with stub_of(running) as stub:
        calls = [stub.Segment.future(request(png(images[0])))]
        running.until(lambda: len(running.runner.batches) == 1)
        calls += [stub.Segment.future(request(png(image))) for image in images[1:]]
        running.until(lambda: running.sample("weakseg_queue_depth") == 4)
        running.runner.gate.set()
        responses = [call.result(LONG_S) for call in calls]
    assert [response.timing.batch_size for response in responses] == [1, 4, 4, 4, 4]
    assert running.runner.batches == [("segmentation", 1), ("segmentation", 4)]
    for response, image in zip(responses, images, strict=True):
        np.testing.assert_array_equal(labels_from_mask(response.outputs[0].mask, CLASSES), model.segment(image).mask)


def test_images_of_different_sizes_do_not_share_a_batch(serving, colours, png):
    running = serving(max_batch=4)
    running.runner.gate.clear()
    with stub_of(running) as stub:
        calls = [stub.Segment.future(request(png(colours)))]
        running.until(lambda: len(running.runner.batches) == 1)
        calls += [stub.Segment.future(request(png(image))) for image in (colours, colours[:-4], colours)]
        running.until(lambda: running.sample("weakseg_queue_depth") == 3)
        running.runner.gate.set()
        sizes = [call.result(LONG_S).timing.batch_size for call in calls]
    assert sizes == [1, 2, 1, 2]


def test_a_response_says_what_its_batch_might_have_been(serving, png):
    running = serving(max_batch=16, max_delay_ms=2.5)
    with stub_of(running) as stub:
        timing = stub.Segment(request(png(np.zeros((64, 64, 3), np.uint8)))).timing
    assert (timing.batch_size, timing.max_batch_size, timing.max_batch_delay.nanos) == (1, 16, 2_500_000)
    running = serving(max_batch=32)
    with stub_of(running) as stub:
        timing = stub.Segment(request(png(np.zeros((64, 64, 3), np.uint8)))).timing
    assert timing.max_batch_size == 16, "of 65536 pixels on a CPU"


def test_images_that_wait_for_a_version_that_is_replaced_get_the_one_they_asked(
    serving, toy_bundle, tmp_path, colours, png
):
    folder = tmp_path / "toy" / "1"
    shutil.copytree(toy_bundle, folder)
    running = serving(max_batch=4, folders=lambda: find_bundles([], tmp_path))
    old = running.runner
    old.gate.clear()
    with stub_of(running) as stub:
        calls = [stub.Segment.future(request(png(colours)))]
        running.until(lambda: len(old.batches) == 1)
        calls.append(stub.Segment.future(request(png(colours))))
        running.until(lambda: running.sample("weakseg_queue_depth") == 1)
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"presence": 0.25}))
        running._loop.call_soon_threadsafe(running.server.reload)
        running.until(lambda: running.server.models.get("toy", "1").model.runner is not old)
        calls.append(stub.Segment.future(request(png(colours))))
        running.until(lambda: running.sample("weakseg_queue_depth") == 2)
        old.gate.set()
        responses = [call.result(LONG_S) for call in calls]
    assert [response.timing.batch_size for response in responses] == [1, 1, 1]
    assert (len(old.batches), len(running.runner.batches)) == (2, 1)
    first, second, third = (response.model_sha256 for response in responses)
    assert first == second != third


def test_a_cancelled_call_never_reaches_the_network(serving, colours, png):
    running = serving(max_batch=1)
    running.runner.gate.clear()
    with stub_of(running) as stub:
        first = stub.Segment.future(request(png(colours)))
        running.until(lambda: len(running.runner.batches) == 1)
        gone = stub.Segment.future(request(png(colours)))
        running.until(lambda: running.sample("weakseg_queue_depth") == 1)
        gone.cancel()
        running.until(lambda: running.sample("weakseg_queue_depth") == 0)
        running.runner.gate.set()
        first.result(LONG_S)
    running.until(lambda: running.server.admission.inflight == 0)
    assert len(running.runner.batches) == 1
    assert running.sample("weakseg_requests_total", model="toy", version="1", code="CANCELLED") == 1


def test_a_call_whose_deadline_passes_in_the_queue_never_reaches_the_network(serving, colours, png):
    running = serving(max_batch=1)
    running.runner.gate.clear()
    with stub_of(running) as stub:
        first = stub.Segment.future(request(png(colours)))
        running.until(lambda: len(running.runner.batches) == 1)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Segment(request(png(colours)), timeout=0.2)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        running.until(lambda: running.server.admission.inflight == 1)
        running.runner.gate.set()
        first.result(LONG_S)
    assert len(running.runner.batches) == 1
    # The client may tell the server that it gave up just before the server's own clock says so.
    codes = ("DEADLINE_EXCEEDED", "CANCELLED")
    assert sum(running.sample("weakseg_requests_total", model="toy", version="1", code=code) for code in codes) == 1


def test_a_call_with_less_time_than_an_execution_takes_never_reaches_the_network(serving, colours, png):
    running = serving()
    pace, runner = running.server.pipeline.pace, running.runner
    kind = ("segmentation", colours.shape)
    with stub_of(running) as stub:
        for _ in range(LEAST):
            stub.Segment(request(png(colours)), timeout=LONG_S)
        (entry,) = running.server.models.entries()
        assert 0 < pace.expected_s(entry.model, kind, time.monotonic()) < LONG_S, "as executions have shown"
        for _ in range(LATEST):
            pace.ran(entry.model, kind, 2 * LONG_S, time.monotonic())
        with pytest.raises(grpc.RpcError) as raised:
            stub.Segment(request(png(colours)), timeout=LONG_S)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "too little time is left" in raised.value.details()
        assert (
            len(runner.batches) == LEAST and running.sample("weakseg_rejected_total", reason="DEADLINE_TOO_SHORT") == 1
        )
        stub.Segment(request(png(colours)))
        small = colours[:8, :8]
        stub.Segment(request(png(small)), timeout=LONG_S)
    assert len(runner.batches) == LEAST + 2, "who has no deadline, or another size, is answered"


@pytest.mark.parametrize(
    ("last", "first_not", "output"),
    [
        ("look", "decode", spec("SEGMENTATION")),
        ("run", "finish", spec("SEGMENTATION")),
        ("run", "finish", spec("PSEUDO_MASK", refinement=pb.REFINEMENT_CRF)),
        ("finish", "encode", spec("SEGMENTATION")),
    ],
    ids=["before it is decoded", "before its mask", "before it is refined", "before it is encoded"],
)
@pytest.mark.parametrize("max_batch", [8, 1], ids=["in pools", "in one thread"])
def test_nothing_more_is_done_once_the_deadline_has_passed(
    serving, colours, png, monkeypatch, max_batch, last, first_not, output
):
    done, late_s = [], [0.0]

    def recorded(step, function):
        def record(*args, **kwargs):
            done.append(step)
            got = function(*args, **kwargs)
            late_s[0] = 2 * LONG_S if step == last else late_s[0]
            return got

        return record

    running = serving(max_batch=max_batch)
    for step, owner, name in (
        ("look", serve.steps, "probe"),
        ("decode", Model, "decode"),
        ("run", running.runner, "run"),
        ("finish", Model, "finish"),
        ("encode", serve.service, "response_from_answer"),
    ):
        monkeypatch.setattr(owner, name, recorded(step, getattr(owner, name)))
    for module in (serve.job, serve.pipeline, serve.visit):
        monkeypatch.setattr(module, "monotonic", lambda: time.monotonic() + late_s[0])
    with stub_of(running) as stub, pytest.raises(grpc.RpcError) as raised:
        stub.Segment(request(png(colours), output), timeout=LONG_S)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert done[-1] == last and first_not not in done


def test_a_client_that_goes_away_ends_its_stream(serving, colours, png):
    running = serving(max_batch=1)
    running.runner.gate.clear()
    more = threading.Event()

    def requests():
        yield pb.SegmentStreamRequest(request=request(png(colours), request_id="0"))
        more.wait(LONG_S)

    with stub_of(running) as stub:
        call = stub.SegmentStream(requests())
        running.until(lambda: running.server.admission.inflight == 1)
        call.cancel()
        running.until(lambda: running.server.admission.inflight == 0)
        more.set()
    running.runner.gate.set()


def test_the_loop_stays_free_while_everything_else_is_busy(serving, colours, png):
    running = serving(max_batch=1)
    running.runner.gate.clear()
    with stub_of(running) as stub:
        calls = [stub.Segment.future(request(png(colours), spec("PSEUDO_MASK"))) for _ in range(4)]
        running.until(lambda: len(running.runner.batches) == 1)
        assert stub.GetModel(pb.GetModelRequest(), timeout=LONG_S).model.state == pb.MODEL_STATE_READY
        running.runner.gate.set()
        assert all(call.result(LONG_S).outputs for call in calls)


def test_after_a_storm_of_deadlines_and_cancellations_nothing_is_left(serving, colours, png):
    running = serving(max_batch=3, max_delay_ms=1.0)
    message = request(png(colours), spec("SEGMENTATION"), spec("PSEUDO_MASK"))

    def storm(seed):
        rng = np.random.default_rng(seed)
        with grpc.insecure_channel(running.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = pb_grpc.SegmentationServiceStub(channel)
            for timeout_s in rng.choice([0.002, 0.01, LONG_S], 20):
                call = stub.Segment.future(message, timeout=timeout_s)
                if rng.random() < 0.2:
                    threading.Event().wait(rng.random() / 100)
                    call.cancel()
                with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
                    call.result()

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    running.until(lambda: running.server.admission.inflight == 0)
    assert running.sample("weakseg_queue_depth") == 0
    with stub_of(running) as stub:
        assert stub.Segment(message, timeout=LONG_S).timing.batch_size == 1


def test_the_memory_of_an_image_is_not_given_back_by_the_loop(serving, colours, png, freed_in):
    running = serving()
    with stub_of(running) as stub:
        stub.Segment(request(png(colours)))
    running.until(lambda: freed_in)
    assert freed_in[0] != running._thread.name
