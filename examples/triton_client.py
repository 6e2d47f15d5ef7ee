"""Ask a weakseg server for masks with NVIDIA's client for Triton; nothing of weakseg is imported.

    pip install 'tritonclient[grpc]' pillow
    weakseg serve --demo                                             # in one terminal
    python examples/triton_client.py localhost:8500 IMAGE [IMAGE …]  # in another

Writes <image>-mask.png, grey, to the folder `masks`: 0 is background, the first class is 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from PIL import Image


def main(target: str, images: list[Path]) -> int:
    output = Path("masks")
    output.mkdir(exist_ok=True)
    with triton.InferenceServerClient(target) as client:
        outputs = [triton.InferRequestedOutput(name) for name in ("segmentation", "scores")]
        for image in images:
            files = np.array([image.read_bytes()], dtype=np.object_)  # a batch of one file
            tensor = triton.InferInput("image", files.shape, "BYTES").set_data_from_numpy(files)
            # No name means the only model of the server; with several of them, give one.
            answer = client.infer("", [tensor], outputs=outputs, client_timeout=30)
            (labels,), (scores,) = answer.as_numpy("segmentation"), answer.as_numpy("scores")
            Image.fromarray(labels).save(output / f"{image.stem}-mask.png")
            classes = json.loads(answer.get_output("scores").parameters["classes"].string_param)
            said = [f"{name} {score:.2f}" for name, score in zip(classes, scores, strict=True)]
            print(f"{image}: {labels.shape[1]}x{labels.shape[0]}, {', '.join(said)}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], [Path(name) for name in sys.argv[2:]]))
