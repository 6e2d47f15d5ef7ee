"""Drift: how far the images that were served of late have moved from those that the model was trained on.

Of each image three numbers are kept, never the image. What the scores mean stands in weakseg/drift.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from weakseg.drift import N_TENTHS, brightness, psi, psi_of_frequencies, psi_of_normals, tenths
from weakseg.manifest import Manifest, TrainingStatistics
from weakseg.model import Model

WINDOW = 1000  # latest images that are compared
LEAST = 200  # images; of fewer, chance alone may look like a change


@dataclass(frozen=True)
class ClassDrift:
    """Share of the images that a class is in by its score, in training and of late."""

    name: str
    training: float
    served: float
    score: float


@dataclass(frozen=True)
class Drift:
    """scores: by signal; one that cannot be told, or not yet, is left out. n_images: in the window."""

    n_images: int
    scores: Mapping[str, float]
    classes: tuple[ClassDrift, ...] = ()


class Window:
    """The latest images of one model; `add` and `drift` may be called in any thread."""

    def __init__(self, training: TrainingStatistics, classes: tuple[str, ...], presence: float) -> None:
        self._training = training
        self._classes = classes
        self._presence = presence
        self._lock = threading.Lock()
        self._n_images = self._n_scored = 0  # ever; the rings have the last WINDOW of them
        self._brightness = np.zeros(WINDOW)
        self._confidence = np.zeros(WINDOW, np.uint8)  # tenth of the highest score
        self._present = np.zeros((WINDOW, len(classes)), np.bool_)

    def add(self, rgb: NDArray[np.uint8], scores: Mapping[str, float]) -> None:
        """An image (H, W, 3) as the network saw it; scores of all classes, or none where no classifier was run."""
        grey = brightness(rgb)
        values = np.fromiter(scores.values(), np.float32, len(scores))
        with self._lock:
            self._brightness[self._n_images % WINDOW] = grey
            self._n_images += 1
            if values.size:
                at = self._n_scored % WINDOW
                self._confidence[at] = tenths(values.max())
                self._present[at] = values >= np.float32(self._presence)
                self._n_scored += 1

    def drift(self) -> Drift:
        with self._lock:
            n, n_scored = min(self._n_images, WINDOW), min(self._n_scored, WINDOW)
            grey, top = self._brightness[:n].copy(), self._confidence[:n_scored].copy()
            served = self._present[:n_scored].sum(axis=0) / max(1, n_scored)
        training, scores = self._training, {}
        if n >= LEAST:
            scores["brightness"] = psi_of_normals(
                training.brightness_mean, training.brightness_std, float(grey.mean()), float(grey.std())
            )
        if n_scored < LEAST:
            return Drift(n, scores)
        if len(training.confidence) == N_TENTHS:
            shares = np.bincount(top, minlength=N_TENTHS) / n_scored
            scores["confidence"] = float(psi(np.array(training.confidence), training.n_images, shares, n_scored))
        if not training.presence_frequency:
            return Drift(n, scores)
        trained = np.array([training.presence_frequency.get(name, 0.0) for name in self._classes])
        by_class = psi_of_frequencies(trained, training.n_images, served, n_scored)
        scores["classes"] = float(by_class.max())
        rows = zip(self._classes, trained.tolist(), served.tolist(), by_class.tolist(), strict=True)
        return Drift(n, scores, tuple(ClassDrift(*row) for row in rows))


class Windows:
    """A window for each model whose manifest has statistics; it goes with the model."""

    def __init__(self) -> None:
        self._windows: WeakKeyDictionary[Model, Window | None] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def of(self, model: Model) -> Window | None:
        with self._lock:
            if model not in self._windows:
                self._windows[model] = window_for(model.manifest)
            return self._windows[model]


def window_for(manifest: Manifest) -> Window | None:
    """None without statistics, which has nothing to compare with."""
    if manifest.training is None:
        return None
    return Window(manifest.training, manifest.classes, manifest.presence)


class DriftGauge(Collector):
    """`weakseg_drift_score`, computed when it is scraped. served: name, version and window of models that answer."""

    def __init__(self, served: Callable[[], Iterable[tuple[str, str, Window | None]]]) -> None:
        self._served = served

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [self._family()]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = self._family()
        for name, version, window in self._served():
            for signal, score in (window.drift().scores if window else {}).items():
                family.add_metric((name, version, signal), score)
        return [family]

    def _family(self) -> GaugeMetricFamily:
        text = "PSI of the latest images against those of training: from 0.1 on a change, from 0.25 on a large one"
        return GaugeMetricFamily("weakseg_drift_score", text, labels=("model", "version", "signal"))
