"""`python -m serve.healthcheck`: exit 0 when the server of this container is ready, for HEALTHCHECK of its image.

It imports nothing of the server, which would take half a second of a core every time. So it knows the port from
WEAKSEG_METRICS_PORT or the file of WEAKSEG_CONFIG, as the server does, but not from flags.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException

PORT = 9464
TIMEOUT_S = 2.0


def main() -> int:
    """0 where /readyz says 200; else 1, and why on stderr."""
    port = metrics_port(os.environ)
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(4096).decode(errors="replace")
    except (OSError, HTTPException) as error:
        print(f"no answer on port {port}: {error!r}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        print(f"not ready: {body}", file=sys.stderr)
    return 0 if answer.status == 200 else 1


def metrics_port(environment: Mapping[str, str]) -> int:
    """What the server has been told, in its order: variable, file, default."""
    if value := environment.get("WEAKSEG_METRICS_PORT"):
        return int(value)
    if file := environment.get("WEAKSEG_CONFIG"):
        with open(file, "rb") as opened:
            return int(tomllib.load(opened).get("metrics_port", PORT))
    return PORT


if __name__ == "__main__":
    sys.exit(main())
