"""Ask a TorchServe that serves one of our archives for masks; the standard library is enough.

    make torchserve                                              # in one terminal
    python examples/torchserve_client.py toy/1 IMAGE [IMAGE …]   # in another, in the same folder

Writes <image>-mask.png (class ids, palette) to the folder `masks`.
"""

import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

URL = "http://127.0.0.1:8080/predictions"
KEY_FILE = Path("build/torchserve/key_file.json")  # TorchServe writes it where it runs


def main(model: str, images: list[Path]) -> int:
    output = Path("masks")
    output.mkdir(exist_ok=True)
    failed = 0
    for image in images:
        key = json.loads(KEY_FILE.read_text())["inference"]["key"]  # read anew: tokens are renewed
        headers = {
            "Authorization": f"Bearer {key}",
            "Content-Type": "application/octet-stream",
            "Weakseg-Format": "json",  # options of Model.segment are headers, too: "Weakseg-Tags": "cat,dog"
        }
        request = urllib.request.Request(f"{URL}/{model}", image.read_bytes(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:  # its body says why
            print(f"{image}: {error.code} {error.read().decode()}", file=sys.stderr)
            failed += 1
            continue
        for kind, mask in answer["masks"].items():
            (output / f"{image.stem}-mask.png").write_bytes(base64.b64decode(mask["png"]))
            print(f"{image}: {kind} of {answer['model']}: {', '.join(row['name'] for row in mask['classes'])}")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], [Path(name) for name in sys.argv[2:]]))
