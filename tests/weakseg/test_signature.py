import base64
import json
import shutil
import stat
import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import weakseg
from weakseg import signature
from weakseg.bundle import open_bundle
from weakseg.bundle_commands import main
from weakseg.errors import BundleError, ConfigError


@pytest.fixture
def key(tmp_path):
    """Path of a private key; the public one lies beside it as signing.pub."""
    signature.keygen(tmp_path / "keys" / "signing.pem")
    return tmp_path / "keys" / "signing.pem"


@pytest.fixture
def public(key):
    return key.with_suffix(".pub")


@pytest.fixture
def signed(toy_bundle, tmp_path, key, capsys):
    """A copy of the toy bundle, signed with `key`."""
    folder = shutil.copytree(toy_bundle, tmp_path / "toy" / "1")
    assert main(["sign", str(folder), "--key", str(key)]) == 0
    capsys.readouterr()
    return folder


def private_pem(key, password=None):
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def public_pem(key):
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_signed_by_the_key(signed, public):
    assert open_bundle(signed).signed_by is None
    [name] = signature.public_keys(public)
    assert open_bundle(signed, public_key=public).signed_by == name
    with weakseg.load(signed, threads=1, public_key=public) as model:
        assert model.bundle.signed_by == name


def test_one_of_several_keys(signed, public, tmp_path):
    """While keys are changed, a file holds the old and the new one."""
    other, _ = signature.keygen(tmp_path / "other.pem")
    both = tmp_path / "both.pub"
    both.write_bytes(b"the old and the new\n" + other.read_bytes() + public.read_bytes())
    assert len(signature.public_keys(both)) == 2
    assert open_bundle(signed, public_key=both).signed_by == open_bundle(signed, public_key=public).signed_by


def test_unsigned(toy_bundle, public):
    with pytest.raises(BundleError, match=r"expected manifest.sig by a key in .*signing.pub, got none: sign it"):
        open_bundle(toy_bundle, public_key=public)


def test_signed_by_another_key(signed, tmp_path):
    other, _ = signature.keygen(tmp_path / "other.pem")
    with pytest.raises(BundleError, match=r"expected a signature by a key in .*other.pub .*, got one by [0-9a-f]{16}…"):
        open_bundle(signed, public_key=other)


def test_another_key_under_the_name_of_ours(signed, public, tmp_path):
    """Which key a signature names is a hint and no proof."""
    signature.keygen(tmp_path / "other.pem")
    made = json.loads(signature.sign((signed / "manifest.json").read_bytes(), tmp_path / "other.pem"))
    [made["key"]] = signature.public_keys(public)
    (signed / "manifest.sig").write_text(json.dumps(made))
    with pytest.raises(BundleError, match="the manifest is not what key"):
        open_bundle(signed, public_key=public)


@pytest.mark.parametrize("at", [0, 30, -2])
def test_a_bit_of_the_manifest(signed, public, at):
    data = bytearray((signed / "manifest.json").read_bytes())
    data[at] ^= 1
    (signed / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError, match="it was changed since"):
        open_bundle(signed, public_key=public)


def test_a_manifest_in_other_words(signed, public):
    """The bytes are signed: nothing has to be parsed before it is trusted."""
    content = json.loads((signed / "manifest.json").read_text())
    (signed / "manifest.json").write_text(json.dumps(content))
    open_bundle(signed)
    with pytest.raises(BundleError, match="it was changed since"):
        open_bundle(signed, public_key=public)


def test_a_file_under_a_true_signature(signed, public):
    data = bytearray((signed / "classifier.onnx").read_bytes())
    data[-1] ^= 1
    (signed / "classifier.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"classifier.onnx is damaged"):
        open_bundle(signed, public_key=public)


def test_a_signature_of_the_bare_manifest_is_none(signed, key, public):
    """What is signed begins with a text of its own, so that no signature made for another purpose counts."""
    private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    made = json.loads((signed / "manifest.sig").read_text())
    made["signature"] = base64.b64encode(private.sign((signed / "manifest.json").read_bytes())).decode()
    (signed / "manifest.sig").write_text(json.dumps(made))
    with pytest.raises(BundleError, match="the manifest is not what key"):
        open_bundle(signed, public_key=public)


def test_what_is_signed(signed, public):
    """As the documentation says it, for those who check with other tools."""
    [checker] = signature.public_keys(public).values()
    made = json.loads((signed / "manifest.sig").read_text())
    text = b"weakseg bundle manifest, signature version 1\0" + (signed / "manifest.json").read_bytes()
    checker.verify(base64.b64decode(made["signature"]), text)


@pytest.mark.parametrize(
    "change",
    [
        {"signature_version": 2},
        {"algorithm": "none"},
        {"key": "\x1b[2J"},
        {"key": None},
        {"signature": "no base64!"},
        {"signature": "c2hvcnQ="},
        {"extra": 1},
    ],
)
def test_signatures_of_another_form(signed, public, change):
    made = json.loads((signed / "manifest.sig").read_text())
    (signed / "manifest.sig").write_text(json.dumps(made | change))
    with pytest.raises(BundleError, match=r"manifest.sig: "):
        open_bundle(signed, public_key=public)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 4000, b" " * 5000])
def test_signatures_that_are_none(signed, public, data):
    (signed / "manifest.sig").write_bytes(data)
    with pytest.raises(BundleError, match=r"manifest.sig: expected"):
        open_bundle(signed, public_key=public)


def test_a_damaged_bundle_is_not_signed(signed, key):
    (signed / "manifest.sig").unlink()
    (signed / "classifier.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="damaged"):
        main(["sign", str(signed), "--key", str(key)])
    assert not (signed / "manifest.sig").exists()


def test_keys_are_private_and_never_overwritten(key, public):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"signing.pem exists, and keys are never overwritten"):
        signature.keygen(key)
    key.unlink()
    with pytest.raises(ConfigError, match=r"signing.pub exists"):
        signature.keygen(key)
    with pytest.raises(ConfigError, match="is the name of a public key"):
        signature.keygen(key.with_name("new.pub"))
    assert not key.exists()


def test_private_keys_that_cannot_sign(tmp_path):
    path = tmp_path / "key.pem"
    cases = {
        "cannot read the key": None,
        "expected a private key in PEM": b"nothing",
        "the key is encrypted": private_pem(Ed25519PrivateKey.generate(), b"secret"),
        "expected an ed25519 key, got another kind": private_pem(ec.generate_private_key(ec.SECP256R1())),
    }
    for message, data in cases.items():
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            signature.sign(b"", path)


def test_public_keys_that_cannot_check(signed, key, tmp_path):
    path = tmp_path / "key.pub"
    cases = {
        "cannot read the key": None,
        "expected a public key, .*, got none": b"nothing",
        "got a private one: give the .pub beside it": key.read_bytes(),
        "expected PEM public keys": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        "expected ed25519 keys, got another kind": public_pem(ec.generate_private_key(ec.SECP256R1())),
    }
    for message, data in cases.items():
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ConfigError, match=message):
            open_bundle(signed, public_key=path)


def test_without_cryptography(signed, public, key, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    open_bundle(signed)
    for action in (
        lambda: open_bundle(signed, public_key=public),
        lambda: signature.sign(b"", key),
        lambda: signature.keygen(key.with_name("new.pem")),
    ):
        with pytest.raises(ConfigError, match=r'need the package cryptography: pip install "weakseg\[sign\]"'):
            action()
