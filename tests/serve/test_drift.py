"""Drift of what a server saw against the statistics of its model's manifest."""

import json
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest

from serve.drift import LEAST, WINDOW, Window
from serve.repository import BundleFolder
from weakseg.client import Client
from weakseg.manifest import TrainingStatistics
from weakseg.v1 import segmentation_service_pb2 as pb
from weakseg.v1 import segmentation_service_pb2_grpc as pb_grpc

CLASSES = ("red", "green", "blue")
PRESENCE = 0.5
TOY_3 = Path(__file__).parents[1] / "data" / "bundles_of_schema_3" / "toy" / "3"
LARGE = 0.25


def training_images(rng, n):
    """n pairs of an image and scores: brightness about 0.4 ± 0.1; red, green, blue in 60, 30 and 5 of 100."""
    for _ in range(n):
        grey = np.clip(rng.normal(0.4, 0.1), 0, 1)
        there = rng.random(3) < [0.6, 0.3, 0.05]
        scores = np.where(there, rng.uniform(0.5, 1, 3), rng.uniform(0, 0.5, 3))
        yield np.full((4, 6, 3), round(grey * 255), np.uint8), dict(zip(CLASSES, scores.tolist(), strict=True))


def statistics_of(images):
    """Those that an export writes."""
    grey = [image.mean() / 255 for image, _ in images]
    scores = np.array([list(of_image.values()) for _, of_image in images])
    top, _ = np.histogram(scores.max(axis=1), bins=10, range=(0, 1))
    present = (scores >= PRESENCE).mean(axis=0)
    return TrainingStatistics(
        n_images=len(images),
        class_frequency=dict.fromkeys(CLASSES, 0.0),  # of tags: not what is compared
        brightness_mean=float(np.mean(grey)),
        brightness_std=float(np.std(grey)),
        presence_frequency=dict(zip(CLASSES, present.tolist(), strict=True)),
        confidence=tuple((top / len(images)).tolist()),
    )


@pytest.fixture(scope="module")
def statistics():
    return statistics_of(list(training_images(np.random.default_rng(0), 2000)))


@pytest.fixture
def window(statistics):
    return Window(statistics, CLASSES, PRESENCE)


def seen(window, change=lambda image, scores: (image, scores), n=WINDOW, seed=1):
    for image, scores in training_images(np.random.default_rng(seed), n):
        window.add(*change(image, scores))
    return window.drift()


@pytest.mark.parametrize("seed", range(1, 6))
def test_images_like_those_of_training_do_not_drift(statistics, seed):
    for n in (LEAST, WINDOW):
        drift = seen(Window(statistics, CLASSES, PRESENCE), n=n, seed=seed)
        assert drift.scores.keys() == {"brightness", "confidence", "classes"}
        assert max(drift.scores.values()) < LARGE / 2


def test_half_the_brightness_is_drift_of_brightness_alone(window):
    scores = seen(window, lambda image, scores: (image // 2, scores)).scores
    assert scores["brightness"] > 4 * LARGE
    assert max(scores["confidence"], scores["classes"]) < LARGE / 2


def test_a_class_that_appears_is_drift_and_named(window):
    drift = seen(window, lambda image, scores: (image, scores | {"blue": max(scores["blue"], 0.6)}))
    assert drift.scores["classes"] > 4 * LARGE and drift.scores["brightness"] < LARGE / 2
    by_name = {row.name: row for row in drift.classes}
    assert by_name["blue"].served == 1 and by_name["blue"].training == pytest.approx(0.05, abs=0.02)
    assert drift.scores["classes"] == by_name["blue"].score > by_name["red"].score


def test_scores_that_fall_are_drift_of_confidence(window):
    drift = seen(window, lambda image, scores: (image, {name: score * 0.7 for name, score in scores.items()}))
    assert drift.scores["confidence"] > LARGE


def test_too_few_images_have_no_score_and_are_counted(window):
    drift = seen(window, n=LEAST - 1)
    assert (drift.n_images, dict(drift.scores), drift.classes) == (LEAST - 1, {}, ())


def test_old_images_leave_the_window(window):
    seen(window, lambda image, scores: (image // 4, dict.fromkeys(scores, 1.0)))
    drift = seen(window)
    assert drift.n_images == WINDOW and max(drift.scores.values()) < LARGE / 2


def test_images_without_scores_tell_the_brightness(window):
    assert seen(window, lambda image, _: (image, {})).scores.keys() == {"brightness"}


def test_a_manifest_of_before_tells_the_brightness(statistics):
    old = TrainingStatistics(100, {}, statistics.brightness_mean, statistics.brightness_std)
    assert seen(Window(old, CLASSES, PRESENCE)).scores.keys() == {"brightness"}


def test_a_server_tells_it_in_metrics_and_models(serving, toy_bundle, tmp_path, colours, png):
    folders = [BundleFolder("toy", "3", TOY_3), BundleFolder("bare", "1", bare(toy_bundle, tmp_path))]
    running = serving(folders=folders)

    def gauge(signal, model="toy", version="3"):
        labels = {"model": model, "version": version, "signal": signal}
        return running.server.metrics.registry.get_sample_value("weakseg_drift_score", labels)

    with Client(running.target, model="toy") as client, Client(running.target, model="bare") as bare_client:
        for result in client.segment_many([png(colours)] * (LEAST - 1), outputs=("cam",)):
            assert result.present == CLASSES
        assert gauge("brightness") is None and client.model().drift == {}
        client.segment(png(colours), outputs=("cam",))
        bare_client.segment(png(colours))
        told = client.model().drift
        assert told == {signal: gauge(signal) for signal in ("brightness", "confidence", "classes")}
        assert told["classes"] > LARGE
        assert gauge("brightness", "bare", "1") is None
    with grpc.insecure_channel(running.target) as channel:
        stub = pb_grpc.SegmentationServiceStub(channel)
        toy = stub.GetModel(pb.GetModelRequest(model=pb.ModelRef(name="toy"))).model
        none = stub.GetModel(pb.GetModelRequest(model=pb.ModelRef(name="bare"))).model
    assert toy.drift.n_images == LEAST and not none.HasField("drift")
    assert [(row.class_id, row.label, row.served_share) for row in toy.drift.classes] == [
        (1, "red", 1.0),
        (2, "green", 1.0),
        (3, "blue", 1.0),
    ]
    assert toy.drift.classes[0].training_share == pytest.approx(0.4)


def bare(toy_bundle, tmp_path):
    """The toy bundle without statistics."""
    folder = shutil.copytree(toy_bundle, tmp_path / "bare")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"training": None}))
    return folder
