"""A bundle that can be asked: `weakseg.load(bundle).segment(image)`, without a server.

`segment` is decode, infer, finish in a row. The service runs the same three from its own pipeline, so that what it
answers is what this module computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from weakseg.bundle import Bundle, open_bundle
from weakseg.cam import MAP_STRIDE, normalise, upsample
from weakseg.classes import ClassTable, ignore_value
from weakseg.crf import is_installed
from weakseg.errors import ConfigError, DataError, ModelFailedError, OutputUnsupportedError, UnknownClassError
from weakseg.image import FILE_FORMATS, MAX_PIXELS, read_reduced, rgb_from_pillow
from weakseg.manifest import (
    AFFINITY,
    CLASSIFIER,
    MULTISCALE,
    OUTPUT_KINDS,
    SEGMENTATION,
    Manifest,
    OutputKind,
    Precision,
)
from weakseg.preprocess import prepare
from weakseg.pseudo_mask import Walk, competing_values, pseudo_mask, refinement_settings
from weakseg.quality import MaskQuality, mask_quality
from weakseg.recipe import CrfConfig, PseudoLabelConfig, WalkConfig
from weakseg.result import Result
from weakseg.runners import Runner, open_runner
from weakseg.runners.checks import n_threads
from weakseg.segmentation import labels_from_logits, probabilities_from_logits
from weakseg.stopping import Check, go_on
from weakseg.threshold import Threshold, after_walk

if TYPE_CHECKING:
    from PIL.Image import Image

Source: TypeAlias = "str | Path | bytes | Image | NDArray[Any]"  # a file, its bytes, or pixels
Refinement = Literal["none", "crf", "random_walk", "random_walk_crf"]  # of CAMs, before they become a pseudo-mask
AGAIN = "the model is damaged, export it again"
ON_CPU = "CPUExecutionProvider"  # of onnxruntime
NOT_FINITE = f"graph {{}} gave values that are not finite: {AGAIN}"
REFINEMENTS: tuple[Refinement, ...] = ("none", "crf", "random_walk", "random_walk_crf")
GraphOutputs = Mapping[str, Mapping[str, NDArray[Any]]]  # {graph: {output: array without the batch axis}}


@dataclass(frozen=True, eq=False)
class Decoded:
    """What is needed of an image from its decoding on.

    prepared: (h, w, 3) uint8 RGB, what the network sees, and a CRF.
    size: (H, W) of the whole image, as it was to be oriented; masks have it.
    rgb: (H, W, 3) uint8 RGB, for `Result.overlay`; None where it was decoded at less, or is not kept.
    """

    prepared: NDArray[np.uint8]
    size: tuple[int, int]
    rgb: NDArray[np.uint8] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """What to compute of an image; made by `Model.request`, which checks it.

    tags: class indices that are in the image; None = by score. threshold: None = as the manifest says.
    crf, walk: what refines the pseudo-mask.
    heatmap_classes: class indices to give maps of; None = the present ones.
    quality: whether to rate the masks.
    """

    outputs: tuple[OutputKind, ...]
    tags: tuple[int, ...] | None = None
    threshold: float | None = None
    crf: CrfConfig | None = None
    walk: WalkConfig | None = None
    cam: Literal["auto", "single", "multiscale"] = "auto"
    heatmap_max_side: int | None = None
    heatmap_classes: tuple[int, ...] | None = None
    quality: bool = False

    @property
    def refinement(self) -> Refinement:
        """What sharpens the pseudo-mask."""
        if self.walk is not None:  # instead of `crf`; it may have one of its own
            return "random_walk" if self.walk.crf is None else "random_walk_crf"
        return "none" if self.crf is None else "crf"

    @property
    def refines(self) -> bool:
        return "pseudo_mask" in self.outputs and self.refinement != "none"

    def unrefined(self) -> Request:
        """The same with refine="none"; it needs no other graphs than this one."""
        return replace(self, crf=None, walk=None)


class Model:
    """A bundle and the runner that executes its graphs; as thread-safe as that. Close it, or use `with`.

    beside: executes them, too, on one thread, for who has several executions at once; see `load`.
    """

    def __init__(self, bundle: Bundle, runner: Runner, beside: Runner | None = None) -> None:
        self.bundle = bundle
        self.manifest: Manifest = bundle.manifest
        self.classes: ClassTable = bundle.manifest.class_table()
        self.palette: NDArray[np.uint8] = bundle.manifest.colours()
        self.runner = runner
        self.beside = beside

    @property
    def refinements(self) -> tuple[Refinement, ...]:
        """What pseudo-masks may be refined by, as packages and graphs are there; () where there are no pseudo-masks."""
        if "pseudo_mask" not in self.manifest.outputs:
            return ()
        own, walk = self.manifest.pseudo_label.crf, self.manifest.walk
        found: list[Refinement] = ["none"]
        if is_installed((own or CrfConfig()).backend):
            found.append("crf")
        if walk is not None and find_spec("scipy") is not None:
            found.append("random_walk")
            if is_installed((walk.crf or own or CrfConfig()).backend):
                found.append("random_walk_crf")
        return tuple(found)

    def segment(
        self,
        image: Source,
        *,
        outputs: Sequence[OutputKind] | None = None,
        tags: Sequence[str] | None = None,
        threshold: float | None = None,
        refine: Refinement | bool | None = None,
        cam: Literal["auto", "single", "multiscale"] = "auto",
        heatmap_max_side: int | None = None,
        quality: bool = False,
        ignore_orientation: bool = False,
        reduced_decoding: bool = False,
    ) -> Result:
        """Compute masks, heatmaps and scores of one image.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or (H, W, 3) RGB or (H, W) grey uint8.
            outputs: of "cam", "pseudo_mask", "segmentation"; None = the segmentation, or what the model has instead.
            tags: names of the classes in the image, if that is known; without, those whose score reaches the manifest's
                threshold. CAMs and pseudo-masks show present classes only; the segmentation network needs no tags.
            threshold: of the pseudo-mask's background, in (0, 1): of CAMs, or what the classes meet after a walk that
                has a constant background.
            refine: of the pseudo-mask: "none", "crf", "random_walk" or "random_walk_crf", these two where the
                bundle has an affinity graph. True is "crf", False "none", None what the manifest says.
            cam: which graph makes the maps; auto = the multi-scale one for pseudo-masks, where the bundle has it.
            heatmap_max_side: heatmaps are scaled down to it.
            quality: also say how sure the masks are of themselves, `Result.quality`.
            ignore_orientation: of files and Pillow images: take the pixels as they are stored, without turning them as
                their EXIF orientation says; the mask is then that of the stored pixels.
            reduced_decoding: of JPEG files that are larger than the network sees: decode only as many pixels as it
                needs, which is faster. Masks keep the size of the image, and differ a little along outlines; the
                result does not carry its image.
        Raises:
            ImageError, DataError: the image cannot be used. UnknownClassError: a tag. ConfigError: another argument.
            OutputUnsupportedError: the model does not have an output. ModelFailedError: its graph failed.
        """
        request = self.request(
            outputs=outputs,
            tags=tags,
            threshold=threshold,
            refine=refine,
            cam=cam,
            heatmap_max_side=heatmap_max_side,
            quality=quality,
        )
        decoded = self.decode(image, ignore_orientation=ignore_orientation, reduced_decoding=reduced_decoding)
        started = perf_counter()
        graph_outputs = self.infer(decoded, request)
        infer_s = perf_counter() - started
        result = self.finish(decoded, graph_outputs, request)
        return replace(result, seconds={"decode": decoded.seconds, "infer": infer_s, **result.seconds})

    def request(
        self,
        *,
        outputs: Sequence[OutputKind] | None = None,
        tags: Sequence[str] | None = None,
        threshold: float | None = None,
        refine: Refinement | bool | None = None,
        cam: Literal["auto", "single", "multiscale"] = "auto",
        heatmap_max_side: int | None = None,
        heatmap_classes: Sequence[str] | None = None,
        quality: bool = False,
    ) -> Request:
        """Check what is asked for against what the model has; arguments and errors as in `segment`."""
        kinds = self._kinds(outputs)
        if threshold is not None and not 0 < threshold < 1:
            raise ConfigError(f"threshold must lie in (0, 1), got {threshold}: leave it out for the model's own")
        if heatmap_max_side is not None and heatmap_max_side < 1:
            raise ConfigError(
                f"heatmap_max_side must be at least 1, got {heatmap_max_side}: leave it out for full size"
            )
        if cam not in ("auto", "single", "multiscale"):
            raise ConfigError(f"unknown cam {cam!r}: expected auto, single or multiscale")
        if cam == "multiscale" and MULTISCALE not in self.manifest.graphs:
            raise OutputUnsupportedError(f"model {self.manifest.id} has no multi-scale maps: ask for cam='single'")
        indices = None if tags is None else self._indices(tags)
        shown = None if heatmap_classes is None else self._indices(heatmap_classes)
        crf, walk = self._refiners(refine)
        if threshold is not None and walk is not None and walk.background is not None:
            walk = replace(walk, background=threshold)
        request = Request(kinds, indices, threshold, crf, walk, cam, heatmap_max_side, shown, quality)
        if request.refines and request.refinement not in self.refinements:
            raise OutputUnsupportedError(
                f"pseudo-masks of {self.manifest.id} cannot be refined by {request.refinement} here, only by "
                f"{', '.join(self.refinements)}: ask for one of these, or pip install 'weakseg[refine]'"
            )
        return request

    def decode(
        self,
        source: Source,
        *,
        max_pixels: int = MAX_PIXELS,
        formats: Collection[str] = FILE_FORMATS,
        ignore_orientation: bool = False,
        reduced_decoding: bool = False,
    ) -> Decoded:
        """Read an image and fit it to the input policy; all but `ignore_orientation` is about files only."""
        started = perf_counter()
        if isinstance(source, (str, Path, bytes)):
            least = self.manifest.input.max_side if reduced_decoding else None
            limits: Any = {"max_pixels": max_pixels, "formats": formats}
            rgb, size = read_reduced(source, least, **limits, ignore_orientation=ignore_orientation)
        else:
            rgb = rgb_from_pixels(source, ignore_orientation=ignore_orientation)
            size = (rgb.shape[0], rgb.shape[1])
        prepared = prepare(rgb, self.manifest.input, size)
        return Decoded(prepared, size, rgb if rgb.shape[:2] == size else None, perf_counter() - started)

    def graphs_for(self, request: Request) -> tuple[str, ...]:
        """Names of the graphs that a request needs."""
        graphs = []
        if "cam" in request.outputs or "pseudo_mask" in request.outputs:
            graphs.append(self._classifier(request))
        if "pseudo_mask" in request.outputs and request.walk is not None:
            graphs.append(AFFINITY)
        if "segmentation" in request.outputs:
            graphs.append(SEGMENTATION)
        return tuple(graphs)

    def outputs_of(self, graph: str, decoded: Decoded, request: Request) -> tuple[str, ...]:
        """Names of the outputs of a graph that `finish` needs of an image.

        The graph's own labels, unless the image was scaled down: then its logits give smoother ones at full size.
        Quality needs the logits in any case.
        """
        has = self.manifest.graphs[graph].outputs
        if graph != SEGMENTATION or "labels" not in has:
            return has
        if decoded.prepared.shape[:2] != decoded.size:
            return ("logits",)
        return ("logits", "labels") if request.quality else ("labels",)

    def infer(self, decoded: Decoded, request: Request) -> GraphOutputs:
        """Run the graphs of a request on one image."""
        images = decoded.prepared[None]
        return {
            graph: {
                name: value[0]
                for name, value in self.runner.run(graph, images, self.outputs_of(graph, decoded, request)).items()
            }
            for graph in self.graphs_for(request)
        }

    def finish(self, decoded: Decoded, outputs: GraphOutputs, request: Request, check: Check = go_on) -> Result:
        """From the graphs' outputs to full-size masks and heatmaps.

        Args:
            outputs: {graph: {output: array of this image, without the batch axis}} for `graphs_for(request)` and
                `outputs_of(...)` each.
            check: of the refinement, called between its steps; what it raises ends the work.
        """
        started = perf_counter()
        height, width = decoded.size
        result = Result(
            self.classes,
            self.palette,
            height,
            width,
            model=self.manifest.id,
            model_sha256=self.bundle.sha256,
            image=decoded.rgb,
        )
        if SEGMENTATION in outputs:
            result = self._finish_segmentation(result, decoded, outputs[SEGMENTATION], request)
        if "cam" in request.outputs or "pseudo_mask" in request.outputs:
            result = self._finish_classifier(result, decoded, outputs, request, check)
        return replace(result, seconds={"postprocess": perf_counter() - started})

    def close(self) -> None:
        self.runner.close()
        if self.beside is not None:
            self.beside.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish_segmentation(
        self, result: Result, decoded: Decoded, outputs: Mapping[str, NDArray[Any]], request: Request
    ) -> Result:
        labels = _segmentation(outputs, decoded, len(self.classes))
        if request.quality:
            likely, in_size = probabilities_from_logits(outputs["logits"]), decoded.prepared.shape[:2]
            rated = mask_quality(labels, self.classes.names, likely, None, in_size, MAP_STRIDE)
            result = replace(result, quality=result.quality | {"segmentation": rated})
        return replace(result, segmentation=labels)

    def _finish_classifier(
        self, result: Result, decoded: Decoded, outputs: GraphOutputs, request: Request, check: Check
    ) -> Result:
        graph = self._classifier(request)
        scores = _finite(outputs[graph]["scores"], graph)
        cam = _finite(outputs[graph]["cam"], graph) / np.float32(self.manifest.graphs[graph].views)
        present = self._present(scores, request)
        names = self.classes.names
        result = replace(
            result,
            scores={name: float(score) for name, score in zip(names, scores, strict=True)},
            present=tuple(names[c] for c in present),
        )
        if "cam" in request.outputs:
            shown = present if request.heatmap_classes is None else request.heatmap_classes
            result = replace(result, heatmaps=self._heatmaps(cam, shown, request.heatmap_max_side))
        if "pseudo_mask" in request.outputs:
            threshold, config = self._threshold(request), replace(self.manifest.pseudo_label, crf=request.crf)
            walk = None
            if request.walk is not None:
                affinities = np.clip(_finite(outputs[AFFINITY]["affinities"], AFFINITY), 0, 1)
                walk = Walk(affinities, self.manifest.graphs[AFFINITY].stride, request.walk)
            labels, rated = self._pseudo_mask(decoded, cam, present, threshold.t, config, walk, request.quality, check)
            made = refinement_settings(config, request.walk)
            name = request.refinement
            result = replace(result, pseudo_mask=labels, threshold=threshold, refinement=made, refined_by=name)
            if rated is not None:
                result = replace(result, quality=result.quality | {"pseudo_mask": rated})
        return result

    def _present(self, scores: NDArray[np.float32], request: Request) -> tuple[int, ...]:
        if request.tags is not None:
            return request.tags
        return tuple(int(c) for c in np.flatnonzero(scores >= np.float32(self.manifest.presence)))

    def _heatmaps(
        self, cam: NDArray[np.float32], classes: tuple[int, ...], max_side: int | None
    ) -> dict[str, NDArray[np.float32]]:
        cam01 = normalise(cam[list(classes)], self.manifest.cam.normalisation)
        return {self.classes.names[c]: _shrunk(cam01[k], max_side) for k, c in enumerate(classes)}

    def _pseudo_mask(
        self,
        decoded: Decoded,
        cam: NDArray[np.float32],
        present: tuple[int, ...],
        t: float,
        config: PseudoLabelConfig,
        walk: Walk | None,
        quality: bool,
        check: Check,
    ) -> tuple[NDArray[Any], MaskQuality | None]:
        """At the size that the network saw, which bounds the CRF's time and memory; then at the image's, by nearest."""
        height, width = decoded.prepared.shape[:2]
        cam01 = upsample(normalise(cam[list(present)], self.manifest.cam.normalisation), height, width)
        classes = np.array(present, dtype=np.int32)
        n = len(self.classes)
        made = pseudo_mask(decoded.prepared, cam01, classes, n, t, config, walk, with_shares=quality, check=check)
        labels = _nearest(made.labels, *decoded.size)
        if not quality:
            return labels, None
        return labels, mask_quality(
            labels, self.classes.names, made.shares, competing_values(classes, n), (height, width)
        )

    def _refiners(self, refine: Refinement | bool | None) -> tuple[CrfConfig | None, WalkConfig | None]:
        """The manifest's settings as far as it has some; a walk has its CRF inside."""
        own, walk = self.manifest.pseudo_label.crf, self.manifest.walk
        if refine is None:
            return own, walk
        if isinstance(refine, bool):
            refine = "crf" if refine else "none"
        if refine not in REFINEMENTS:
            raise ConfigError(f"unknown refine {refine!r}: expected one of {', '.join(REFINEMENTS)}, True or False")
        if refine in ("none", "crf"):
            return (own or CrfConfig()) if refine == "crf" else None, None
        if walk is None:
            raise OutputUnsupportedError(
                f"model {self.manifest.id} has no affinity graph for a random walk: ask for crf or none"
            )
        after = walk.crf or own or CrfConfig()
        return None, replace(walk, crf=after if refine == "random_walk_crf" else None)

    def _threshold(self, request: Request) -> Threshold:
        if request.threshold is None:
            return after_walk(self.manifest.background, request.walk)
        return Threshold(request.threshold, "request", "given with the request")

    def _classifier(self, request: Request) -> str:
        multiscale = request.cam == "multiscale" or (request.cam == "auto" and "pseudo_mask" in request.outputs)
        return MULTISCALE if multiscale and MULTISCALE in self.manifest.graphs else CLASSIFIER

    def _kinds(self, outputs: Sequence[OutputKind] | None) -> tuple[OutputKind, ...]:
        has = self.manifest.outputs
        if outputs is None:
            return ("segmentation",) if "segmentation" in has else has
        if isinstance(outputs, str) or not outputs or any(kind not in OUTPUT_KINDS for kind in outputs):
            raise ConfigError(f"outputs must be some of {', '.join(OUTPUT_KINDS)}, got {outputs!r}")
        missing = [kind for kind in outputs if kind not in has]
        if missing:
            raise OutputUnsupportedError(f"model {self.manifest.id} has no {missing[0]}: it has {', '.join(has)}")
        return tuple(kind for kind in OUTPUT_KINDS if kind in outputs)

    def _indices(self, names: Sequence[str]) -> tuple[int, ...]:
        if isinstance(names, str):
            raise UnknownClassError(f"tags must be a list of class names, got the text {names!r}: write [{names!r}]")
        return tuple(sorted({self.classes.index(name) for name in names}))


def load(
    bundle: str | Path,
    *,
    runtime: str = "onnxruntime",
    provider: str | None = None,
    precision: Precision = "fp32",
    threads: int | None = None,
    public_key: str | Path | None = None,
    beside: bool = False,
) -> Model:
    """Open a model bundle, verify it, and make it ready to run.

    Args:
        bundle: folder of the bundle, of a model (the latest version), or of exactly one model.
        runtime: what executes it, see `weakseg.runners`.
        provider: what the runtime executes it on, e.g. cuda of onnxruntime; None = the runtime's own choice.
        precision: of the graphs that have it; others stay fp32.
        threads: cores to use; None = all that this process may use.
        public_key: PEM file of the keys of which one must have signed the bundle; None = it need not be signed.
        beside: open the graphs a second time, for one thread: `Model.beside`, for executions side by side. It is None
            where that would gain nothing: with one thread, on a GPU, in other runtimes than onnxruntime.
    Raises:
        BundleError: missing, damaged, not signed by such a key, or refused. ConfigError: the runtime or provider is
            unknown or not installed, the bundle does not have the precision, or the key cannot be used.
    """
    if precision == "bf16" and not runtime.startswith("tensorrt"):
        raise ConfigError(f"bf16 runs in TensorRT alone, got the runtime {runtime}: choose fp32, or fp16 on a GPU")
    opened = open_bundle(bundle, public_key=public_key)
    graphs = opened.graph_paths(precision)
    runner = open_runner(graphs, runtime=runtime, provider=provider, threads=threads)
    if not beside or runner.provider != ON_CPU or n_threads(threads) == 1:
        return Model(opened, runner)
    return Model(opened, runner, open_runner(graphs, runtime=runtime, provider=provider, threads=1))


def rgb_from_pixels(source: Image | NDArray[Any], *, ignore_orientation: bool = False) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of what is decoded already; the client sends images through here too.

    A Pillow image is turned as its EXIF orientation says, unless that is ignored. Of a TIFF there is nothing left to
    ignore: Pillow itself turns it when it loads it.

    Raises:
        DataError: another type, shape or dtype.
    """
    return _rgb_from_array(source) if isinstance(source, np.ndarray) else _rgb_from_image(source, ignore_orientation)


def _rgb_from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or 0 in array.shape
        or (array.ndim == 3 and array.shape[2] != 3)
    ):
        raise DataError(f"expected an image (H, W, 3) RGB or (H, W) grey, uint8, got {array.shape} {array.dtype}")
    return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array


def _rgb_from_image(image: Any, ignore_orientation: bool) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise DataError(f"expected a path, bytes, a Pillow image or an array, got {type(image).__name__}")
    return rgb_from_pillow(image if ignore_orientation else ImageOps.exif_transpose(image))


def _segmentation(outputs: Mapping[str, NDArray[Any]], decoded: Decoded, n_classes: int) -> NDArray[Any]:
    """(H, W) mask values; the output `labels` where the graph was asked for it, or from its logits."""
    if "labels" not in outputs:
        logits = _finite(outputs["logits"], SEGMENTATION)
        if len(logits) != n_classes + 1:
            raise ModelFailedError(
                f"expected logits of {n_classes} classes and background, got {logits.shape}: {AGAIN}"
            )
        return labels_from_logits(logits, *decoded.size, *decoded.prepared.shape[:2])
    labels = outputs["labels"]
    if labels.shape != decoded.size or labels.dtype.kind != "u":
        raise ModelFailedError(f"expected unsigned labels {decoded.size}, got {labels.shape} {labels.dtype}: {AGAIN}")
    if labels.flat[0] == ignore_value(labels):  # the graph's mark of an image whose logits are not finite
        raise ModelFailedError(NOT_FINITE.format(SEGMENTATION))
    return labels


def _finite(values: NDArray[np.float32], graph: str) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise ModelFailedError(NOT_FINITE.format(graph))
    return values


def _shrunk(heatmap: NDArray[np.float32], max_side: int | None) -> NDArray[np.float32]:
    height, width = heatmap.shape
    longest = max(height, width)
    if max_side is None or longest <= max_side:
        return heatmap
    size = (max(1, round(width * max_side / longest)), max(1, round(height * max_side / longest)))
    return np.asarray(cv2.resize(heatmap, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def _nearest(labels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Labels at another size: each pixel takes the one that its centre falls into."""
    if labels.shape == (height, width):
        return labels
    rows = (2 * np.arange(height) + 1) * labels.shape[0] // (2 * height)
    cols = (2 * np.arange(width) + 1) * labels.shape[1] // (2 * width)
    scaled: NDArray[Any] = labels[rows[:, None], cols]
    return scaled
