"""Ask a weakseg server for masks, heatmaps and scores.

    weakseg serve --demo                                      # in one terminal
    python examples/client.py localhost:8500 IMAGE [IMAGE …]  # in another

Writes <image>-mask.png (class ids, palette) and <image>-overlay.png to the folder `masks`.
"""

import sys
from pathlib import Path

from weakseg.client import Client
from weakseg.errors import WeaksegError
from weakseg.image import read_image


def main(target: str, images: list[Path]) -> int:
    output = Path("masks")
    output.mkdir(exist_ok=True)
    with Client(target) as client:
        model = client.model()
        print(f"{model.id} on {model.provider}: {', '.join(model.classes.names if model.classes else ())}")

        # One image, everything that the model can say about it.
        result = client.segment(images[0], outputs=model.outputs)
        for name in result.present:
            heatmap = result.heatmaps.get(name)
            shape = "none" if heatmap is None else "x".join(map(str, heatmap.shape))
            print(f"  {name}: score {result.scores[name]:.2f}, heatmap {shape}")
        print("  " + ", ".join(f"{stage} {seconds * 1000:.1f} ms" for stage, seconds in result.seconds.items()))

        # Many images over one stream: results come in the order of the images, eight are under way at a time.
        for image, masked in zip(images, client.segment_many(images, on_error="return"), strict=True):
            if isinstance(masked, WeaksegError):
                print(f"{image}: {masked}", file=sys.stderr)
                continue
            masked.save(output / f"{image.stem}-mask.png")
            masked.overlay(image=read_image(image)).save(output / f"{image.stem}-overlay.png")
            print(f"{image}: {', '.join(masked.legend()) or 'background only'}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], [Path(name) for name in sys.argv[2:]]))
