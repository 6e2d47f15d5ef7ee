"""inference.GRPCInferenceService, the Open Inference Protocol, so that clients of Triton and KServe can ask our models.

    input    image         BYTES [B] of JPEG, PNG or WebP files, or UINT8 [B, H, W, 3] of RGB pixels
    outputs  segmentation  UINT8 [B, H, W], UINT16 above 254 classes: mask values, 0 = background
             pseudo_mask   the same; 255 (65535) = undecided
             scores        FP32 [B, C] in [0, 1], by class
             cam           FP32 or FP16 [B, C, h, w] in [0, 1]; 0 for classes that are not present
    parameters of the request, which hold for all its images
             refinement    none, crf, random_walk or random_walk_crf
             threshold     of the pseudo-mask's background
             tags          names of the classes in the images, joined by commas, or a JSON list
             cam_datatype  FP32 or FP16
             priority      as on Triton the smaller the sooner: 1 = interactive, 2 and more = bulk, 0 = the default, 1

An image is an image: it goes through the same pipeline, limits and counters as one of SegmentationService.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import weakseg
from serve.calls import Context, call_of, counted
from serve.health import Health
from serve.inference import grpc_inference_service_pb2 as oip
from serve.inference import grpc_inference_service_pb2_grpc as oip_grpc
from serve.interceptors import INFERENCE_SERVICE
from serve.job import Answer, Job
from serve.metrics import Metrics
from serve.models import Entry, Models
from serve.oip_requests import Options, check_sizes, options_from_request, outputs_of, with_model
from serve.oip_tensors import INPUT, add_output, datatype_of, images_from_request
from serve.pipeline import Pipeline
from serve.settings import ServeConfig
from weakseg.classes import ignore_value, mask_dtype
from weakseg.errors import ModelNotFoundError, ResponseTooLargeError
from weakseg.model import Decoded, Model
from weakseg.result import Result

if TYPE_CHECKING:  # an extra
    from serve.tracing import Tracing

_CAM_DTYPES: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16}
_STAGES = ("queue", "decode", "infer", "postprocess", "encode")


class InferenceService(oip_grpc.GRPCInferenceServiceServicer):
    """The six methods. Errors leave them as exceptions; serve/interceptors.py makes status codes of them."""

    def __init__(
        self,
        config: ServeConfig,
        models: Models,
        pipeline: Pipeline,
        metrics: Metrics,
        health: Health,
        tracing: Tracing | None = None,
    ) -> None:
        self._config = config
        self._models = models
        self._pipeline = pipeline
        self._metrics = metrics
        self._health = health
        self._tracing = tracing

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:  # noqa: ARG002, N802
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:  # noqa: ARG002, N802
        return oip.ServerReadyResponse(ready=self._health.ready)

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:  # noqa: ARG002, N802
        """False of a model that there is not, as on Triton: clients that wait for a model ask until it is true."""
        try:
            entry = self._models.get(request.name, request.version)
        except ModelNotFoundError:
            return oip.ModelReadyResponse(ready=False)
        return oip.ModelReadyResponse(ready=self._health.is_ready(entry))

    async def ServerMetadata(  # noqa: N802
        self,
        request: oip.ServerMetadataRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name="weakseg", version=weakseg.__version__)

    async def ModelMetadata(  # noqa: N802
        self,
        request: oip.ModelMetadataRequest,
        context: Context,  # noqa: ARG002
    ) -> oip.ModelMetadataResponse:
        with self._models.use(request.name, request.version) as (entry, model):
            return self._describe(entry, model)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> oip.ModelInferResponse:  # noqa: N802
        call = call_of(f"{INFERENCE_SERVICE}/ModelInfer", context)
        with counted(self._metrics, call, request_id=request.id, tracing=self._tracing) as outcome:
            options = options_from_request(request)
            images = images_from_request(request, self._config.max_batch, self._config.max_pixels)
            outcome.n_images, outcome.priority = len(images), options.priority
            with self._models.use(request.model_name, request.model_version, request.id) as (entry, model):
                outcome.model = (entry.name, entry.version)
                options, asked = with_model(options, model)
                job = partial(Job, deadline=call.deadline, priority=options.priority, trace=outcome.trace)
                tensor = request.inputs[0]
                pixels = (tensor.shape[1], tensor.shape[2]) if tensor.datatype == "UINT8" else None
                jobs = [job(entry.name, entry.version, model, image, asked, size=pixels) for image in images]

                def check(decoded: list[Decoded]) -> None:
                    check_sizes(decoded, options.outputs)
                    height, width = decoded[0].size
                    outcome.fields = {"width": width, "height": height}

                limit_bytes = self._config.max_message_bytes
                encode = partial(response_from_answers, id_=request.id, options=options, limit_bytes=limit_bytes)
                response, size = await self._pipeline.segment_all(jobs, check, encode)
                outcome.response_bytes = size
            outcome.fields |= {"images": len(images), **_fields(response)}
        self._pipeline.admission.unread.until_sent(size, context)
        return response

    def _describe(self, entry: Entry, model: Model) -> oip.ModelMetadataResponse:
        labels, n_classes = datatype_of(mask_dtype(len(model.classes))), len(model.classes)
        known = {
            "segmentation": (labels, [-1, -1, -1]),
            "pseudo_mask": (labels, [-1, -1, -1]),
            "scores": ("FP32", [-1, n_classes]),
            "cam": ("FP32", [-1, n_classes, -1, -1]),
        }
        tensor = oip.ModelMetadataResponse.TensorMetadata
        others = [other for other in self._models.entries() if other.name == entry.name and other.model is not None]
        return oip.ModelMetadataResponse(
            name=entry.name,
            versions=[other.version for other in others],
            platform="weakseg_bundle",
            inputs=[tensor(name=INPUT, datatype="BYTES", shape=[-1])],
            outputs=[tensor(name=name, datatype=known[name][0], shape=known[name][1]) for name in outputs_of(model)],
            properties={
                "classes": json.dumps(model.classes.names),  # by index; mask value = index + 1
                "image_datatypes": "BYTES [-1] of JPEG, PNG or WebP files, UINT8 [-1, -1, -1, 3] of RGB pixels",
                "max_batch_size": str(self._config.max_batch),
                "max_image_pixels": str(self._config.max_pixels),
                "max_message_bytes": str(self._config.max_message_bytes),
                "presence_threshold": str(model.manifest.presence),
                "execution_provider": model.runner.provider,
                "sha256": model.bundle.sha256,
            },
        )


def response_from_answers(
    answers: Sequence[Answer], *, id_: str, options: Options, limit_bytes: int
) -> tuple[oip.ModelInferResponse, int]:
    """The reply to a batch, and its size in bytes; runs in a thread.

    Times are those of the slowest image, `batch_size` the smallest that an image went through a network in.

    Raises:
        ResponseTooLargeError: above `limit_bytes`.
    """
    started = monotonic()
    results = [answer.result for answer in answers]
    arrays = {name: [_array(name, result, options) for result in results] for name in options.outputs}
    _check_size(sum(array.nbytes for batch in arrays.values() for array in batch), limit_bytes)
    name, version = results[0].model.split("/")
    response = oip.ModelInferResponse(model_name=name, model_version=version, id=id_)
    for output, batch in arrays.items():
        tensor = add_output(response, output, np.stack(batch), raw=options.raw)
        threshold = results[0].threshold
        if output == "scores":  # tritonclient has no properties of a model, where they are, too
            tensor.parameters["classes"].string_param = json.dumps(results[0].classes.names)
        if output == "pseudo_mask" and threshold is not None:
            tensor.parameters["threshold"].double_param = threshold.t
            tensor.parameters["threshold_rule"].string_param = threshold.rule
            tensor.parameters["ignore_value"].int64_param = ignore_value(batch[0])
            tensor.parameters["refinement"].string_param = ",".join(str(result.refined_by) for result in results)
            cut_short = any(result.refinement_cut_short for result in results)
            tensor.parameters["refinement_cut_short"].bool_param = cut_short
    response.parameters["model_sha256"].string_param = results[0].model_sha256
    response.parameters["batch_size"].int64_param = min(answer.batch_size for answer in answers)
    response.parameters["max_batch_size"].int64_param = min(answer.max_batch_size for answer in answers)
    response.parameters["max_batch_delay_ms"].double_param = round(answers[0].max_batch_delay_s * 1000, 3)
    seconds = {stage: max(answer.seconds[stage] for answer in answers) for stage in _STAGES[:-1]}
    seconds["encode"] = monotonic() - started
    for stage in _STAGES:
        response.parameters[f"{stage}_ms"].double_param = round(seconds[stage] * 1000, 3)
    size = response.ByteSize()
    _check_size(size, limit_bytes)  # typed elements may take two bytes each
    return response, size


def _array(name: str, result: Result, options: Options) -> NDArray[Any]:
    """One image's part of an output."""
    names = result.classes.names
    if name == "scores":
        return np.array([result.scores[c] for c in names], np.float32)
    if name == "cam":
        present = {*result.present}
        maps = [cam01 if c in present else np.zeros_like(cam01) for c, cam01 in result.heatmaps.items()]
        return np.stack(maps).astype(_CAM_DTYPES[options.cam_datatype])
    labels = result.segmentation if name == "segmentation" else result.pseudo_mask
    assert labels is not None, f"the model gave no {name} though it was asked for one"
    return labels.astype(mask_dtype(len(names)), casting="safe", copy=False)


def _check_size(n_bytes: int, limit_bytes: int) -> None:
    if n_bytes > limit_bytes:
        raise ResponseTooLargeError(
            f"expected a response of at most {limit_bytes} bytes, got {n_bytes}: ask for fewer outputs or images, "
            "or for cam as FP16"
        )


def _fields(response: oip.ModelInferResponse) -> dict[str, Any]:
    times = {f"{stage}_ms": response.parameters[f"{stage}_ms"].double_param for stage in _STAGES}
    return times | {"batch_size": response.parameters["batch_size"].int64_param}
