"""Signatures of certificates by SSH keys, made and checked by ssh-keygen."""

from __future__ import annotations

import subprocess
from pathlib import Path

from syncbn.conformance import ConformanceError

NAMESPACE = "certificate@syncbn"
SUFFIX = ".sig"
_SECONDS = 60


class SignatureError(ConformanceError):
    """A signature that cannot be made, or is not right. The message is one line."""


def sign(certificate: Path, key: Path) -> None:
    """Write the signature of a file next to it.

    Args:
        certificate: the file.
        key: a private key, or a public one whose private key an agent has.

    Raises:
        SignatureError: with the message of ssh-keygen.
    """
    if not key.is_file():
        raise SignatureError(f"key must be a file, got {key}")
    _keygen("sign", "-f", str(key), "-n", NAMESPACE, str(certificate))


def check(certificate: bytes, signature: Path, allowed_signers: Path | None) -> str:
    """Who signed a certificate.

    Args:
        certificate: the bytes of the certificate.
        signature: the file of its signature.
        allowed_signers: whom to trust, as ssh-keygen(1) describes the file; None to check only
            that some key made the signature.

    Returns:
        The principal of the file, or "a key that was not compared with a list".

    Raises:
        SignatureError: the signature is not one of the certificate, or its key is not on the list.
    """
    options = ("-n", NAMESPACE, "-s", str(signature))
    if allowed_signers is None:
        _keygen("check-novalidate", *options, input=certificate)
        return "a key that was not compared with a list"
    if not allowed_signers.is_file():
        raise SignatureError(f"allowed signers must be a file, got {allowed_signers}")
    listed = ("-f", str(allowed_signers))
    found = _keygen("find-principals", "-s", str(signature), *listed).splitlines()
    if not found:
        raise SignatureError("no key of the list of allowed signers made the signature")
    _keygen("verify", *listed, "-I", found[0], *options, input=certificate)
    return found[0]


def _keygen(action: str, *arguments: str, input: bytes = b"") -> str:
    command = ["ssh-keygen", "-Y", action, *arguments]
    try:
        done = subprocess.run(command, input=input, capture_output=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise SignatureError("signatures need ssh-keygen, which is not installed") from None
    except subprocess.TimeoutExpired:
        raise SignatureError(f"ssh-keygen did not end within {_SECONDS} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise SignatureError(f"ssh-keygen {action}: {said[-1] if said else 'failed'}")
    return done.stdout.decode(errors="replace")
