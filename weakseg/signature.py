"""Who made a bundle: an ed25519 signature over its manifest, which holds the hashes of all other files.

What is signed is DOMAIN followed by the bytes of manifest.json: a signature that the key made of anything else, under
another version of this format say, is none of a manifest. Anyone can check it, with openssl too (docs/bundle.md).
Needs the package `cryptography` (extra `sign`), only where something is signed or checked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weakseg.errors import BundleError, ConfigError
from weakseg.files import write_bytes_atomic
from weakseg.records import from_json, to_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

DOMAIN = b"weakseg bundle manifest, signature version 1\0"
LIMIT_BYTES = 4096  # of manifest.sig

_PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Signature:
    """manifest.sig. key: fingerprint of the key that is said to have made it. signature: base64."""

    signature_version: Literal[1]
    algorithm: Literal["ed25519"]
    key: str
    signature: str


def keygen(path: Path) -> tuple[Path, str]:
    """Write a new private key, which only its owner may read, and beside it the public one, *.pub.

    Returns:
        The public key's path and fingerprint.

    Raises:
        ConfigError: one of the files exists, or cryptography is not installed.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_path = path.with_suffix(".pub")
    if public_path == path:
        raise ConfigError(f"{path} is the name of a public key: name the private one, {path.with_suffix('.pem')} say")
    for existing in (path, public_path):
        if existing.exists():
            raise ConfigError(f"{existing} exists, and keys are never overwritten: choose another name")
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private)
    public = key.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_bytes_atomic(public_path, pem)
    return public_path, fingerprint(public)


def sign(manifest: bytes, private_key: Path) -> bytes:
    """The content of manifest.sig.

    Raises:
        ConfigError: no ed25519 private key there, or cryptography is not installed.
    """
    key = _private_key(private_key)
    made = base64.b64encode(key.sign(DOMAIN + manifest)).decode()
    record = Signature(1, "ed25519", fingerprint(key.public_key()), made)
    return (json.dumps(to_json(record), indent=2) + "\n").encode()


def parse(data: bytes, where: str) -> Signature:
    """Read manifest.sig; it is checked only by `check`.

    Raises:
        BundleError: not of that form. The message begins with `where`.
    """
    try:
        parsed = from_json(Signature, json.loads(data), "signature")
        if not _FINGERPRINT.fullmatch(parsed.key):
            raise ValueError("a key that is no fingerprint")
    except (ValueError, RecursionError) as error:  # RecordError is a ValueError
        raise BundleError(f"{where}: expected a signature, got {error}: sign the bundle again") from error
    return parsed


def check(manifest: bytes, signature: bytes, public_key: Path, where: str) -> str:
    """Fingerprint of the one of the public keys that made the signature.

    Args:
        signature: content of manifest.sig.
        public_key: a PEM file of one or, while keys are changed, several keys.
        where: path of the signature, for messages.
    Raises:
        BundleError: none of the keys made it of this manifest. ConfigError: as `public_keys`.
    """
    keys = public_keys(public_key)
    said = parse(signature, where)
    try:
        made = base64.b64decode(said.signature, validate=True)
    except ValueError as error:
        raise BundleError(f"{where}: expected base64, got {error}: sign the bundle again") from error
    from cryptography.exceptions import InvalidSignature

    for name, key in keys.items():
        try:
            key.verify(made, DOMAIN + manifest)
        except InvalidSignature:
            continue
        return name
    if said.key in keys:
        raise BundleError(
            f"{where}: the manifest is not what key {short(said.key)} signed: it was changed since. Copy the bundle "
            "again, or sign it again if the change is yours"
        )
    expected = ", ".join(map(short, keys))
    raise BundleError(
        f"{where}: expected a signature by a key in {public_key} ({expected}), got one by {short(said.key)}: "
        "sign the bundle with your key, or add theirs if you trust it"
    )


def public_keys(path: Path) -> dict[str, Ed25519PublicKey]:
    """{fingerprint: key} of a PEM file.

    Raises:
        ConfigError: no such file, no ed25519 public key in it, or cryptography is not installed.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read(path)
    keys = {}
    for block in _PUBLIC_KEY.findall(data):
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"{path}: expected PEM public keys, got {error}: copy the file again") from error
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"{path}: expected ed25519 keys, got another kind: `weakseg bundle keygen` makes them")
        keys[fingerprint(key)] = key
    if not keys:
        private = ", got a private one: give the .pub beside it" if b"PRIVATE KEY-----" in data else ", got none"
        raise ConfigError(f"{path}: expected a public key, -----BEGIN PUBLIC KEY-----{private}")
    return keys


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's DER form, as `openssl pkey -pubin -outform DER | sha256sum` prints it."""
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def short(name: str) -> str:
    """A fingerprint for people."""
    return f"{name[:16]}…"


def _private_key(path: Path) -> Ed25519PrivateKey:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read(path), password=None)
    except TypeError as error:  # its way to say so
        raise ConfigError(f"{path}: the key is encrypted: decrypt it first, with `openssl pkey` say") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: expected a private key in PEM: `weakseg bundle keygen` makes one") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: expected an ed25519 key, got another kind: `weakseg bundle keygen` makes one")
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror or error}") from error


def _need_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise ConfigError('signatures need the package cryptography: pip install "weakseg[sign]"')
