"""Draw docs/images/demo.webp from a run on the synthetic set: `python docs/images/make.py runs/demo`."""

import base64
import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from weakseg.progress import Progress
from weakseg.report import recipe_of
from weakseg.report.pictures import LAYERS, Picture, choose_pictures

CELL, GAP, HEADER = 232, 10, 34
ROWS = (0, 2, 4, 6)  # of the report's twelve: two of the best, two of the median


def main(folder: Path) -> None:
    shown = choose_pictures(recipe_of(folder), folder, Progress()).shown
    rows = [shown[i] for i in ROWS]
    heights = [round(CELL * one.height / one.width) for one in rows]
    columns = ("photograph", *LAYERS)
    size = (len(columns) * (CELL + GAP) - GAP, HEADER + sum(heights) + GAP * (len(rows) - 1))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(17)
    for i, name in enumerate(columns):
        draw.text((i * (CELL + GAP) + CELL / 2, HEADER / 2 - 3), name, fill="#333333", font=font, anchor="mm")
    y = HEADER
    for one, height in zip(rows, heights, strict=True):
        for i, name in enumerate(columns):
            sheet.paste(cell(one, name).resize((CELL, height), Image.Resampling.LANCZOS), (i * (CELL + GAP), y))
        y += height + GAP
    sheet.save(Path(__file__).with_name("demo.webp"), quality=86, method=6)


def cell(one: Picture, name: str) -> Image.Image:
    photograph = decoded(one.photograph).convert("RGBA")
    layer = one.layers.get(name)
    if layer is not None:
        photograph.alpha_composite(decoded(layer).convert("RGBA"))
    return photograph.convert("RGB")


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
