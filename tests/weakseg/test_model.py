import io
from dataclasses import asdict, replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

import weakseg
from weakseg.bundle import open_bundle
from weakseg.errors import (
    BundleError,
    ConfigError,
    DataError,
    ImageError,
    ModelFailedError,
    OutputUnsupportedError,
    UnknownClassError,
)
from weakseg.image import upright
from weakseg.manifest import Graph
from weakseg.masks.png import provenance_of
from weakseg.model import Model
from weakseg.quality import ClassQuality
from weakseg.recipe import CrfConfig, WalkConfig
from weakseg.stopping import StoppedError

MODELS = Path(__file__).parents[1] / "data" / "bundles"
WSSS_MINI = Path("../shared/data/wsss-mini")
RED, BLUE, IGNORE = 1, 3, 255


@pytest.fixture(scope="module")
def model():
    with weakseg.load(MODELS / "toy", threads=1) as made:
        yield made


def picture(height: int = 16, width: int = 32) -> np.ndarray:
    """Left half red, right half grey."""
    image = np.full((height, width, 3), 128, dtype=np.uint8)
    image[:, : width // 2] = [255, 0, 0]
    return image


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class OneRunner:
    """Gives every graph the same outputs."""

    provider = "Fake"

    def __init__(self, **outputs):
        self.outputs = outputs

    def run(self, graph, images, outputs=None):
        return self.outputs

    def close(self):
        pass


def test_segmentation_is_the_default(model):
    result = model.segment(picture())
    assert result.mask.dtype == np.uint8
    np.testing.assert_array_equal(result.mask[:, :14], RED)
    np.testing.assert_array_equal(result.mask[:, 18:], 0)
    assert (result.model, result.model_sha256) == ("toy/1", open_bundle(MODELS).sha256)
    assert result.scores == {}
    assert result.pseudo_mask is None
    assert set(result.seconds) == {"decode", "infer", "postprocess"}


def test_everything_at_once(model):
    result = model.segment(picture(), outputs=("segmentation", "cam", "pseudo_mask"))
    assert result.scores == pytest.approx({"red": 1.0, "green": 0.0, "blue": 0.0})
    assert result.present == ("red",)
    assert list(result.heatmaps) == ["red"]
    np.testing.assert_allclose(result.heatmaps["red"], np.repeat([[1, 1, 1, 1, 0, 0, 0, 0]], 4, axis=0), atol=1e-4)
    assert result.pseudo_mask.shape == (16, 32)
    assert set(np.unique(result.pseudo_mask)) == {0, RED, IGNORE}
    assert result.threshold.rule == "fixed"
    assert result.overlay().size == (32, 16)


def test_pseudo_mask_thresholds_where_the_closed_form_says(model):
    # Between the cell centres 13.5 and 17.5 the map falls from 1 to 0; t = 0.4 with a band of 20 % is 0.32 .. 0.48.
    row = model.segment(picture(), outputs=["pseudo_mask"]).pseudo_mask[0]
    cam01 = np.interp(np.arange(32), [13.5, 17.5], [1, 0])
    expected = np.where(cam01 > 0.48, RED, np.where(cam01 > 0.32, IGNORE, 0))
    np.testing.assert_array_equal(row, expected)


def test_threshold_of_the_request(model):
    high = model.segment(picture(), outputs=["pseudo_mask"], threshold=0.8)
    low = model.segment(picture(), outputs=["pseudo_mask"], threshold=0.1)
    assert (high.threshold.t, high.threshold.rule) == (0.8, "request")
    assert (high.pseudo_mask == RED).sum() < (low.pseudo_mask == RED).sum()


def test_views_are_divided_out(model):
    single = model.segment(picture(), outputs=["cam"], cam="single").heatmaps["red"]
    multi = model.segment(picture(), outputs=["cam"], cam="multiscale").heatmaps["red"]
    np.testing.assert_array_equal(single, multi)


def test_graphs_for(model):
    def graphs(*outputs, **more):
        return model.graphs_for(model.request(outputs=outputs, **more))

    assert graphs("segmentation") == ("segmentation",)
    assert graphs("cam") == ("classifier",)
    assert graphs("pseudo_mask") == ("classifier_multiscale",)
    assert graphs("pseudo_mask", "cam", "segmentation") == ("classifier_multiscale", "segmentation")
    assert graphs("pseudo_mask", cam="single") == ("classifier",)


def test_tags_decide_which_classes_are_shown(model):
    result = model.segment(picture(), outputs=["cam", "pseudo_mask"], tags=["blue"])
    assert list(result.heatmaps) == ["blue"]
    assert RED not in result.pseudo_mask
    none = model.segment(picture(), outputs=["cam", "pseudo_mask"], tags=[])
    assert none.heatmaps == {}
    assert (none.pseudo_mask == 0).all()
    assert none.scores["red"] == pytest.approx(1.0)


def test_absent_classes_by_score(model):
    grey = model.segment(np.full((8, 8, 3), 90, np.uint8), outputs=["cam", "pseudo_mask"])
    assert grey.present == ()
    assert grey.heatmaps == {}
    assert (grey.pseudo_mask == 0).all()


def test_presence_counts_equality():
    opened = open_bundle(MODELS)
    cam = np.zeros((1, 3, 2, 2), np.float32)
    made = Model(opened, OneRunner(scores=np.array([[0.5, 0.49, 0.51]], np.float32), cam=cam))
    assert made.segment(picture(8, 8), outputs=["cam"]).present == ("red", "blue")


def test_heatmap_max_side_and_classes(model):
    result = model.segment(picture(32, 64), outputs=["cam"], heatmap_max_side=4)
    assert result.heatmaps["red"].shape == (2, 4)
    request = model.request(outputs=["cam"], heatmap_classes=["green"])
    decoded = model.decode(picture())
    assert list(model.finish(decoded, model.infer(decoded, request), request).heatmaps) == ["green"]


def test_refine_uses_the_crf(model):
    image = picture(24, 40)
    rough = model.segment(image, outputs=["pseudo_mask"], tags=["red"], threshold=0.2)
    fine = model.segment(image, outputs=["pseudo_mask"], tags=["red"], threshold=0.2, refine=True)
    assert (rough.pseudo_mask[:, 20:] == RED).any()
    assert not (fine.pseudo_mask[:, 20:] == RED).any()
    manifest = replace(model.manifest, pseudo_label=replace(model.manifest.pseudo_label, crf=CrfConfig()))
    with_crf = Model(replace(model.bundle, manifest=manifest), model.runner)
    off = with_crf.segment(image, outputs=["pseudo_mask"], tags=["red"], threshold=0.2, refine=False)
    np.testing.assert_array_equal(off.pseudo_mask, rough.pseudo_mask)
    assert (rough.refinement["crf"], fine.refinement["crf"]) == (None, asdict(CrfConfig()))
    assert off.refinement["crf"] is None
    assert provenance_of(fine.mask_png())["t"] == 0.2 and model.segment(image).refinement == {}


@pytest.fixture(scope="module", params=["toy", "labels"])
def either(request, model):
    """The graphs of schema 1, and those that have an output `labels`."""
    if request.param == "toy":
        yield model
    else:
        with weakseg.load(MODELS.parent / "bundles_of_schema_2" / "toy" / "2", threads=1) as made:
            yield made


def test_quality_of_a_segmentation_has_a_closed_form(either):
    """Logits are 0.25 for background and 1 for red on the left, 0.25 and 0 on the right; two more are 0."""
    asked = either.request(outputs=["segmentation"], quality=True)
    assert "logits" in either.outputs_of("segmentation", either.decode(picture()), asked)
    made = either.segment(picture(), quality=True)
    np.testing.assert_array_equal(made.mask, either.segment(picture()).mask)
    left, right = (np.exp(logits) / np.exp(logits).sum() for logits in ([0.25, 1, 0, 0], [0.25, 0, 0, 0]))
    rated = made.quality["segmentation"]
    assert [(one.value, one.name) for one in rated.classes] == [(0, "background"), (RED, "red")]
    background, red = rated.classes
    assert (background.area_px, red.area_px) == ((made.mask == 0).sum(), (made.mask == RED).sum())
    # Red reaches a pixel or two beyond the middle of the picture, where cells are grey.
    beyond = red.area_px // 16 - 16
    assert 0 <= beyond < 4
    assert background.confidence == pytest.approx(right[0], abs=1e-5)
    assert red.confidence == pytest.approx((16 * left[1] + beyond * right[1]) / (16 + beyond), abs=1e-5)
    whole = (background.area_px * background.confidence + red.area_px * red.confidence) / (16 * 32)
    assert (rated.undecided_px, rated.confidence) == (0, pytest.approx(whole))
    spread = [-(p * np.log(p)).sum() / np.log(4) for p in (left, right)]
    assert rated.entropy == pytest.approx(np.mean(spread), abs=1e-5)


def test_quality_of_a_pseudo_mask_has_a_closed_form(model):
    """Red is 1 up to column 13 and 0 from column 18; against it stands a background of (1 - red)^alpha."""
    made = model.segment(picture(), outputs=["pseudo_mask"], quality=True)
    np.testing.assert_array_equal(made.mask, model.segment(picture(), outputs=["pseudo_mask"]).mask)
    cam01 = np.interp(np.arange(32), [13.5, 17.5], [1, 0])
    alphas = [np.log(t) / np.log(1 - t) for t in (0.32, 0.48)]
    red = np.mean([cam01 / (cam01 + (1 - cam01) ** alpha) for alpha in alphas], axis=0)
    row, rated = made.mask[0], made.quality["pseudo_mask"]
    assert [(one.name, one.area_px) for one in rated.classes] == [
        ("background", 16 * (row == 0).sum()),
        ("red", 16 * (row == RED).sum()),
    ]
    assert rated.undecided_px == 16 * (row == IGNORE).sum() > 0
    expected = [(1 - red)[row == 0].mean(), red[row == RED].mean()]
    np.testing.assert_allclose([one.confidence for one in rated.classes], expected, atol=1e-4)
    both = np.stack([red, 1 - red]).clip(1e-9)
    assert rated.entropy == pytest.approx(-(both * np.log(both)).sum(axis=0).mean() / np.log(2), abs=1e-4)


def test_quality_of_an_image_that_was_scaled_down(model):
    """Every other pixel of a mask is between two of the network's: areas are those of the image."""
    made = model.segment(picture(64, 128), outputs=["segmentation", "pseudo_mask"], quality=True)
    for kind, rated in made.quality.items():
        labels = getattr(made, kind)
        areas = {one.value: one.area_px for one in rated.classes} | {IGNORE: rated.undecided_px}
        assert areas == {value: (labels == value).sum() for value in areas}
        assert sum(areas.values()) == 64 * 128
    small = model.segment(picture(32, 64), outputs=["pseudo_mask"], quality=True).quality["pseudo_mask"]
    assert made.quality["pseudo_mask"].confidence == pytest.approx(small.confidence, abs=1e-6)
    assert made.quality["pseudo_mask"].entropy == pytest.approx(small.entropy, abs=1e-6)


def test_without_a_present_class_nothing_competes_with_the_background(model):
    rated = model.segment(picture(), outputs=["pseudo_mask"], tags=[], quality=True).quality["pseudo_mask"]
    assert rated.classes == (ClassQuality(0, "background", 16 * 32),)
    assert (rated.confidence, rated.entropy) == (None, None)


def test_quality_is_there_when_it_is_asked_for(model):
    assert model.segment(picture(), outputs=["segmentation", "pseudo_mask"]).quality == {}
    assert model.segment(picture(), outputs=["cam"], quality=True).quality == {}


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 2), (200, 100), (65, 64)])
def test_masks_have_the_images_size(model, shape):
    result = model.segment(
        np.zeros((*shape, 3), np.uint8), outputs=["segmentation", "pseudo_mask", "cam"], tags=["red"]
    )
    assert result.segmentation.shape == result.pseudo_mask.shape == shape
    height, width = model.decode(np.zeros((*shape, 3), np.uint8)).prepared.shape[:2]
    assert max(height, width) <= 64
    assert result.heatmaps["red"].shape == (-(-height // 4), -(-width // 4))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150))
def test_large_images_keep_the_layout(model, height, width):
    image = np.full((height, width, 3), 128, dtype=np.uint8)
    image[: height // 2] = [255, 0, 0]
    mask = model.segment(image, outputs=["pseudo_mask"], tags=["red"]).pseudo_mask
    margin = 4 * max(height, width, 64) // 64 + 1
    assert (mask[: max(0, height // 2 - margin)] == RED).all()
    assert (mask[height // 2 + margin :] == 0).all()


def test_all_kinds_of_sources_agree(model, tmp_path):
    image = picture()
    (tmp_path / "a.png").write_bytes(png(image))
    expected = model.segment(image).mask
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), png(image), Image.fromarray(image)):
        np.testing.assert_array_equal(model.segment(source).mask, expected)


def test_grey_and_rotated_images(model):
    assert model.segment(np.zeros((5, 7), np.uint8)).mask.shape == (5, 7)
    assert model.segment(Image.new("L", (7, 5))).mask.shape == (5, 7)
    assert model.segment(Image.new("1", (7, 5))).mask.shape == (5, 7)
    turned = Image.fromarray(picture())
    turned.getexif()[0x0112] = 6
    assert model.segment(turned).mask.shape == (32, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_or_ignored(model, orientation):
    stored = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    expected = model.segment(stored).mask
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    for source in (buffer.getvalue(), Image.open(buffer)):
        ignored = model.segment(source, ignore_orientation=True)
        np.testing.assert_array_equal(ignored.mask, expected)
        np.testing.assert_array_equal(ignored.image, stored)
        applied = model.segment(source)
        np.testing.assert_array_equal(applied.image, upright(stored, orientation))
        np.testing.assert_array_equal(applied.mask, model.segment(upright(stored, orientation)).mask)


@pytest.mark.parametrize("size", [(512, 384), (1021, 633), (701, 1000)])
def test_reduced_decoding_gives_nearly_the_same_masks_at_the_same_size(model, size):
    """Smooth colours, such as a photograph has at the few pixels that the network sees of it."""
    coarse = np.random.default_rng(size[0]).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95, exif=exif)
    kinds = model.manifest.outputs
    tags = model.classes.names
    exact = model.segment(buffer.getvalue(), outputs=kinds, tags=tags)
    reduced = model.segment(buffer.getvalue(), outputs=kinds, tags=tags, reduced_decoding=True)
    assert (reduced.height, reduced.width) == (exact.height, exact.width) == size
    assert reduced.image is None
    for kind in exact.mask_kinds:
        assert getattr(reduced, kind).shape == size
        assert (getattr(reduced, kind) == getattr(exact, kind)).mean() > 0.95
    for name, score in exact.scores.items():
        assert reduced.scores[name] == pytest.approx(score, abs=0.1)
        assert reduced.heatmaps[name].shape == exact.heatmaps[name].shape


@pytest.mark.skipif(not WSSS_MINI.is_dir(), reason="needs ../shared/data/wsss-mini")
def test_reduced_decoding_of_photographs(model):
    """The toy model's labels are the strongest colour of a few pixels, so this is about its input above all."""
    agreeing = []
    for path in sorted(WSSS_MINI.glob("JPEGImages/*.jpg"))[::400]:
        photo = Image.open(path)
        buffer = io.BytesIO()
        photo.resize((photo.width * 3 + 1, photo.height * 3 - 1)).save(buffer, "JPEG", quality=90)
        exact, reduced = (model.segment(buffer.getvalue(), reduced_decoding=value) for value in (False, True))
        agreeing.append((exact.mask == reduced.mask).mean())
    assert min(agreeing) > 0.97


def test_the_policy_that_refuses_looks_at_the_whole_image(model):
    manifest = replace(model.manifest, input=replace(model.manifest.input, policy="refuse"))
    refusing = Model(replace(model.bundle, manifest=manifest), model.runner)
    buffer = io.BytesIO()
    Image.new("RGB", (640, 100)).save(buffer, "JPEG")
    for reduced in (False, True):
        with pytest.raises(ImageError, match="at most 64 pixels a side, got 640x100"):
            refusing.segment(buffer.getvalue(), reduced_decoding=reduced)


def test_segment_is_its_three_parts(model):
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    outputs = ("cam", "pseudo_mask", "segmentation")
    whole = model.segment(image, outputs=outputs)
    request, decoded = model.request(outputs=outputs), model.decode(image)
    parts = model.finish(decoded, model.infer(decoded, request), request)
    np.testing.assert_array_equal(whole.segmentation, parts.segmentation)
    np.testing.assert_array_equal(whole.pseudo_mask, parts.pseudo_mask)
    assert whole.scores == parts.scores


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"outputs": ["depth"]}, ConfigError, "outputs must be some of cam, pseudo_mask, segmentation"),
        ({"outputs": []}, ConfigError, "outputs must be some of"),
        ({"outputs": "cam"}, ConfigError, "outputs must be some of"),
        ({"threshold": 1.0}, ConfigError, r"threshold must lie in \(0, 1\)"),
        ({"threshold": float("nan")}, ConfigError, r"threshold must lie in"),
        ({"heatmap_max_side": 0}, ConfigError, "heatmap_max_side"),
        ({"cam": "triple"}, ConfigError, "unknown cam 'triple'"),
        ({"tags": ["bleu"]}, UnknownClassError, "did you mean 'blue'"),
        ({"tags": "blue"}, UnknownClassError, "list of class names"),
    ],
)
def test_wrong_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.segment(picture(), **arguments)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (b"no image", ImageError),
        ("/no/such/file.jpg", ImageError),
        (np.zeros((4, 4, 4), np.uint8), DataError),
        (np.zeros((4, 4, 3)), DataError),
        (np.zeros((0, 4, 3), np.uint8), DataError),
        (7, DataError),
    ],
)
def test_wrong_images(model, source, error):
    with pytest.raises(error, match="expected"):
        model.segment(source)


def test_outputs_that_a_model_lacks(model):
    graphs = {"classifier": model.manifest.graphs["classifier"]}
    small = Model(
        replace(model.bundle, manifest=replace(model.manifest, graphs=graphs, outputs=("cam", "pseudo_mask"))),
        model.runner,
    )
    with pytest.raises(OutputUnsupportedError, match="has no segmentation: it has cam, pseudo_mask"):
        small.segment(picture(), outputs=["segmentation"])
    with pytest.raises(OutputUnsupportedError, match="no multi-scale"):
        small.segment(picture(), outputs=["cam"], cam="multiscale")
    assert small.segment(picture()).mask.shape == (16, 32)


def test_a_model_that_gives_nan():
    logits = np.full((1, 4, 4, 8), np.nan, np.float32)
    with pytest.raises(ModelFailedError, match="not finite"):
        Model(open_bundle(MODELS), OneRunner(logits=logits)).segment(picture())


def test_load_of_nothing(tmp_path):
    with pytest.raises(BundleError, match="no such folder"):
        weakseg.load(tmp_path / "absent")


class WalkRunner(OneRunner):
    """Maps whose left cell answers; affinities that let it flow everywhere. Notes which graphs were run."""

    def __init__(self):
        cam = np.zeros((1, 3, 4, 8), np.float32)
        cam[0, 0, :, :2] = 1
        super().__init__(scores=np.array([[0.9, 0.1, 0.1]], np.float32), cam=cam)
        self.ran = []

    def run(self, graph, images, outputs=None):
        self.ran.append(graph)
        return {"affinities": np.ones((1, 34, 2, 4), np.float32)} if graph == "affinity" else self.outputs


@pytest.fixture
def walking():
    opened = open_bundle(MODELS)
    graphs = opened.manifest.graphs | {"affinity": Graph("affinity.onnx", ("affinities",), stride=8)}
    manifest = replace(opened.manifest, graphs=graphs, walk=WalkConfig(steps=32))
    return Model(replace(opened, manifest=manifest), WalkRunner())


def test_the_manifests_walk_makes_pseudo_masks(walking):
    made = walking.segment(picture(), outputs=["pseudo_mask"], threshold=0.3)
    assert walking.runner.ran == ["classifier_multiscale", "affinity"]
    assert made.refinement["random_walk"]["steps"] == 32
    assert made.refinement["crf"] is None
    plain = walking.segment(picture(), outputs=["pseudo_mask"], threshold=0.3, refine="none")
    assert walking.runner.ran[2:] == ["classifier_multiscale"]
    assert "random_walk" not in plain.refinement
    assert set(np.unique(plain.mask)) - {IGNORE} == {0, RED}
    assert not np.array_equal(made.mask, plain.mask)


@pytest.mark.parametrize(("refine", "crf", "walks"), [("crf", True, False), (True, True, False), (False, False, False)])
def test_a_request_may_leave_the_walk_out(walking, refine, crf, walks):
    made = walking.segment(picture(), outputs=["pseudo_mask"], refine=refine).refinement
    assert (made["crf"] is not None, "random_walk" in made) == (crf, walks)


def test_a_walk_with_a_crf_after_it(walking):
    made = walking.segment(picture(), outputs=["pseudo_mask"], refine="random_walk_crf").refinement
    assert made["crf"] is not None
    assert "random_walk" in made


@pytest.mark.parametrize(("asked", "t", "rule"), [(None, 0.25, "fixed"), (0.6, 0.6, "request")])
def test_a_walk_with_a_constant_background(walking, asked, t, rule):
    manifest = replace(walking.manifest, walk=WalkConfig(steps=32, background=0.25))
    model = Model(replace(walking.bundle, manifest=manifest), walking.runner)
    made = model.segment(picture(), outputs=["pseudo_mask"], threshold=asked)
    assert (made.threshold.t, made.threshold.rule) == (t, rule)
    assert made.refinement["random_walk"]["background"] == t
    assert set(np.unique(made.mask)) == {RED}  # all cells mix: at their mean, the largest value, everywhere
    without = model.segment(picture(), outputs=["pseudo_mask"], refine="none").threshold
    assert without == model.manifest.background


def test_a_walk_without_an_affinity_graph(model):
    with pytest.raises(OutputUnsupportedError, match="no affinity graph for a random walk: ask for crf or none"):
        model.segment(picture(), outputs=["pseudo_mask"], refine="random_walk")


def test_an_unknown_refinement(model):
    with pytest.raises(ConfigError, match="expected one of none, crf, random_walk, random_walk_crf, True or False"):
        model.segment(picture(), outputs=["pseudo_mask"], refine="magic")


def labelling(labels):
    """A model of schema version 2 whose graph has labels of its own; and what its runner was asked for."""
    opened = open_bundle(MODELS)
    graphs = opened.manifest.graphs
    graphs = graphs | {"segmentation": replace(graphs["segmentation"], outputs=("logits", "labels"))}
    asked = []

    class Runner(OneRunner):
        def run(self, graph, images, outputs=None):
            asked.append(outputs)
            logits = np.zeros((1, 4, -(-images.shape[1] // 4), -(-images.shape[2] // 4)), np.float32)
            logits[:, 2] = 1
            return {name: value for name, value in {"labels": labels, "logits": logits}.items() if name in outputs}

    return Model(replace(opened, manifest=replace(opened.manifest, graphs=graphs)), Runner()), asked


def test_the_graphs_own_labels_unless_the_image_was_scaled_down():
    own = np.full((1, 40, 60), 3, np.uint8)
    model, asked = labelling(own)
    assert (model.segment(np.zeros((40, 60, 3), np.uint8)).segmentation == 3).all()
    scaled = model.segment(np.zeros((100, 128, 3), np.uint8)).segmentation  # the toy sees 64 pixels a side
    assert scaled.shape == (100, 128) and (scaled == 2).all()
    assert asked == [("labels",), ("logits",)]


def test_labels_that_say_not_finite():
    model, _ = labelling(np.full((1, 40, 60), 255, np.uint8))
    with pytest.raises(ModelFailedError, match="graph segmentation gave values that are not finite"):
        model.segment(np.zeros((40, 60, 3), np.uint8))


@pytest.mark.parametrize("refine", ["crf", "random_walk", "random_walk_crf"])
def test_what_is_stopped_can_be_finished_without_refinement(walking, refine):
    request = walking.request(outputs=["pseudo_mask"], refine=refine)
    assert request.refines and request.refinement == refine
    assert request.unrefined() == walking.request(outputs=["pseudo_mask"], refine="none")
    assert not walking.request(outputs=["cam"], refine=refine).refines
    decoded = walking.decode(picture())
    outputs = walking.infer(decoded, request)

    def stop():
        raise StoppedError

    with pytest.raises(StoppedError):
        walking.finish(decoded, outputs, request, stop)
    plain = walking.finish(decoded, outputs, request.unrefined(), stop)
    expected = walking.segment(picture(), outputs=["pseudo_mask"], refine="none")
    np.testing.assert_array_equal(plain.mask, expected.mask)
    assert plain.mask_text("pseudo_mask") == expected.mask_text("pseudo_mask")
    assert plain.refined_by == "none" and walking.finish(decoded, outputs, request).refined_by == refine


def test_a_model_may_have_graphs_for_one_thread_beside(toy_bundle, colours):
    assert weakseg.load(toy_bundle, threads=2).beside is None
    assert weakseg.load(toy_bundle, threads=1, beside=True).beside is None
    with weakseg.load(toy_bundle, threads=2, beside=True) as model:
        assert (model.runner.threads, model.beside.threads) == (2, 1)
        for graph in model.manifest.graphs:
            apart, beside = (runner.run(graph, colours[None]) for runner in (model.runner, model.beside))
            for name, value in apart.items():
                np.testing.assert_allclose(beside[name], value, atol=1e-6)
