"""What test_tritonclient_slow.py asks with the real client, in that client's own environment.

    python tritonclient_calls.py TARGET IMAGE.png OUT.npz

Every array that came goes into OUT.npz; what else was said is printed as one JSON object.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

OUTPUTS = ("segmentation", "pseudo_mask", "scores", "cam")


def tensor(array, datatype, module=triton):
    return module.InferInput("image", list(array.shape), datatype).set_data_from_numpy(array)


def requested(*names, module=triton):
    return [module.InferRequestedOutput(name) for name in names]


def error(call, *args, **options):
    try:
        call(*args, **options)
    except InferenceServerException as raised:
        return [raised.status(), raised.message()]
    raise AssertionError(f"{call} was expected to fail")


async def later(target, files):
    async with triton_aio.InferenceServerClient(target) as client:
        answer = await client.infer(
            "toy", [tensor(files, "BYTES", triton_aio)], outputs=requested("segmentation", module=triton_aio)
        )
        return answer.as_numpy("segmentation")


def main(target, image, out):
    files = np.array([image.read_bytes()], dtype=np.object_)
    pixels = np.asarray(Image.open(image))[None]
    found = {}
    with triton.InferenceServerClient(target) as client:
        said = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": [
                client.is_model_ready(*model) for model in (("toy",), ("toy", "1"), ("toy", "9"), ("dog",))
            ],
            "server": client.get_server_metadata(as_json=True),
            "model": client.get_model_metadata("toy", as_json=True),
        }
        for kind, given in (("BYTES", files), ("UINT8", pixels)):
            answer = client.infer("toy", [tensor(given, kind)], outputs=requested(*OUTPUTS), request_id=kind)
            said[f"id of {kind}"] = answer.get_response().id
            found |= {f"{kind}/{name}": answer.as_numpy(name) for name in OUTPUTS}
        answer = client.infer("toy", [tensor(pixels, "UINT8")])  # no outputs: all of them
        found |= {f"all/{name}": answer.as_numpy(name) for name in OUTPUTS}
        halves = {"cam_datatype": "FP16"}
        answer = client.infer("toy", [tensor(files, "BYTES")], outputs=requested("cam"), parameters=halves)
        found["half/cam"] = answer.as_numpy("cam")
        options = {"threshold": 0.2, "refinement": "none", "tags": "red,green"}
        asked = {"outputs": requested("pseudo_mask"), "parameters": options, "priority": 2}
        answer = client.infer("toy", [tensor(files, "BYTES")], **asked)
        found["options/pseudo_mask"] = answer.as_numpy("pseudo_mask")
        batch = np.concatenate([files] * 3)
        answer = client.infer("toy", [tensor(batch, "BYTES")], outputs=requested("segmentation"), client_timeout=60)
        found["batch/segmentation"] = answer.as_numpy("segmentation")
        said["errors"] = {
            "broken": error(client.infer, "toy", [tensor(np.array([b"none"], dtype=np.object_), "BYTES")]),
            "model": error(client.infer, "dog", [tensor(files, "BYTES")]),
            "datatype": error(client.infer, "toy", [tensor(pixels.astype(np.float32), "FP32")]),
            "shared memory": error(client.get_system_shared_memory_status),
        }
    found["aio/segmentation"] = asyncio.run(later(target, files))
    np.savez(out, **found)
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
