"""Write grad_cam.jsonl beside this file: python -m tests.training.cams.make_golden

What jacobgil/pytorch-grad-cam makes of `of_waves`: `pip install grad-cam==1.5.7`, in an environment of its own. It
imports torchvision, of whose compiled operators it calls none here: their names are declared, in case they do not load.
Nothing is random.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from tests.training.cams.networks import of_waves, waves

FILE = Path(__file__).with_name("grad_cam.jsonl")
METHODS = {"grad_cam": "GradCAM", "grad_cam_pp": "GradCAMPlusPlus", "layer_cam": "LayerCAM"}
LAYERS = ("1", "3")


def declare_operators() -> torch.library.Library:
    """Those that torchvision describes in Python, for as long as what is returned lives."""
    library = torch.library.Library("torchvision", "DEF")
    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).with_name("_meta_registrations.py").read_text()
    for name in sorted(set(re.findall(r'(?:register_meta\("|torchvision::)(\w+)"', text))):
        library.define(f"{name}(Tensor x) -> Tensor")
    return library


def main() -> None:
    library = declare_operators()
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images, lines = of_waves(), waves(2, 2, 5, 6, phase=1.0), []
    for name, theirs in METHODS.items():
        for layer in LAYERS:
            extractor = getattr(pytorch_grad_cam, theirs)(model, [model.get_submodule(layer)])
            maps = []
            for c in range(3):
                extractor(images, [ClassifierOutputTarget(c)] * len(images))
                activations, gradients = (
                    getattr(extractor.activations_and_grads, kind)[0].numpy() for kind in ("activations", "gradients")
                )
                # Before it is stretched to [0, 1] and to the image.
                raw = extractor.get_cam_image(images, None, None, activations, gradients, False)
                maps.append(np.maximum(raw, 0))
            values = [float(f"{value:.6g}") for value in np.stack(maps, axis=1).ravel()]
            lines.append(json.dumps({"method": name, "layer": layer, "maps": values}))
    FILE.write_text("\n".join(lines) + "\n")
    del library


if __name__ == "__main__":
    main()
