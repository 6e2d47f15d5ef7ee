"""The committed stubs import under every protobuf that users may have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import google.protobuf, sys
assert google.protobuf.__version__.startswith(sys.argv[1] + "."), google.protobuf.__version__
from weakseg.v1 import segmentation_service_pb2 as pb
assert pb.SegmentRequest.FromString(pb.SegmentRequest(request_id="a").SerializeToString()).request_id == "a"
from serve.inference import grpc_inference_service_pb2 as oip
assert oip.ModelInferRequest.FromString(oip.ModelInferRequest(id="a").SerializeToString()).id == "a"
"""

# tritonclient brings the same messages in other files, which one process cannot have: clients must not import ours.
CLIENT = """
import sys
from google.protobuf import descriptor_pool
import weakseg.client
assert not [name for name in sys.modules if name.split(".")[0] == "serve"]
try:
    descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
except KeyError:
    pass
else:
    raise AssertionError("the messages of the Open Inference Protocol are registered")
"""


def test_the_client_leaves_the_open_inference_protocol_to_others() -> None:
    subprocess.run([sys.executable, "-c", CLIENT], check=True)


@pytest.mark.slow  # three downloads
@pytest.mark.parametrize("major", ["5", "6", "7"])
def test_stubs_import_under_protobuf(major: str, tmp_path: Path) -> None:
    wanted = {"5": "protobuf>=5.29,<6", "6": "protobuf>=6,<7", "7": "protobuf>=7,<8"}[major]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*pip, wanted, "googleapis-common-protos"], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path.cwd())])}
    subprocess.run([sys.executable, "-W", "error", "-c", CHECK, major], check=True, env=environment)
