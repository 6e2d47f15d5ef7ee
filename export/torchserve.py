"""A model bundle as an archive of TorchServe (.mar): a zip of the bundle, our handler and a manifest.

Written here, not by torch-model-archiver, which stamps the time into manifest and entries and flattens folders: the
same bundle and the same weakseg give the same bytes. Needs no torch.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

from export import torchserve_handler
from export.torchserve_handler import BUNDLE
from weakseg.bundle import MANIFEST, SIGNATURE, Bundle, open_bundle
from weakseg.errors import BundleError
from weakseg.files import write_bytes_atomic

HANDLER = "torchserve_handler.py"
CONFIG = "model-config.yaml"
# TorchServe's own default is a worker per core; one of ours uses all cores, so more of them is for the user to ask for.
WORKERS = {"minWorkers": 1, "maxWorkers": 1}
_FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # of the zip format


def export_archive(path: Path, store: Path) -> dict[str, Any]:
    """Write <store>/<name>-<version>.mar; an older archive there is replaced, whole or not at all.

    Args:
        path: a bundle, as `open_bundle` takes it, or a run folder that has one.
        store: a folder of archives, TorchServe's --model-store.
    Returns:
        {"archive": its path, "model": "name/version", "sha256": of the bundle, "mib"}.
    Raises:
        BundleError: no bundle, a damaged one, or the archive cannot be written.
    """
    opened = open_bundle(path / "bundle" if (path / "config.json").is_file() else path)
    manifest = opened.manifest
    target = store / f"{manifest.name}-{manifest.version}.mar"
    try:
        write_bytes_atomic(target, archive_from_bundle(opened))
    except OSError as error:
        raise BundleError(
            f"cannot write {target}: {error.strerror or error}: choose a folder with space that you may write to"
        ) from error
    mib = round(target.stat().st_size / 2**20, 1)
    return {"archive": str(target), "model": manifest.id, "sha256": opened.sha256, "mib": mib}


def archive_from_bundle(opened: Bundle) -> bytes:
    """The archive of a verified bundle. Entries are stored, not compressed: weights do not get smaller."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in _small_files(opened).items():
            archive.writestr(_entry(name), data)
        signed = [SIGNATURE] if (opened.folder / SIGNATURE).exists() else []
        for name in sorted((MANIFEST, *signed, *opened.manifest.files)):
            archive.writestr(_entry(f"{BUNDLE}/{name}"), (opened.folder / name).read_bytes())
    return buffer.getvalue()


def _small_files(opened: Bundle) -> dict[str, bytes]:
    """TorchServe's manifest, as torch-model-archiver 0.12 writes it but for the time; settings; the handler."""
    manifest = {
        "runtime": "python",
        "model": {
            "modelName": opened.manifest.name,
            "modelVersion": opened.manifest.version,
            "handler": HANDLER,
            "configFile": CONFIG,
        },
        "archiverVersion": "0.12.0",
    }
    return {
        "MAR-INF/MANIFEST.json": json.dumps(manifest, indent=2).encode(),
        CONFIG: "".join(f"{key}: {value}\n" for key, value in WORKERS.items()).encode(),
        HANDLER: Path(torchserve_handler.__file__).read_bytes(),
    }


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _FIRST_DAY)
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = 0o644 << 16
    return info
