"""Packages that were made to harm the one who verifies them, and signatures of others."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from syncbn.conformance.__main__ import main
from syncbn.conformance.certification import contents, raw, signature
from syncbn.conformance.certification.folder import UnreadableError
from syncbn.conformance.certification.verify import verify
from syncbn.conformance.wire import encode
from tests.conformance.certification.packages import PLAN, bind, load, store
from tests.test_imports import ROOT

REPORT, RAW = "runs/2/report.json", "runs/2/raw.bin"
needs_keys = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")


@pytest.fixture
def package(passed: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    shutil.copytree(passed, folder)
    return folder


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)
        bind(folder)

    return apply


def record(packed: bytes, size: int) -> bytes:
    return raw.MAGIC + struct.pack("<II", len(packed), size) + packed


def cut(name: str, size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])
        bind(folder)

    return apply


def link(name: str, to: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        path.symlink_to(to)

    return apply


def pipe(folder: Path) -> None:
    (folder / RAW).unlink()
    os.mkfifo(folder / RAW)


def version(name: str) -> Callable[[Path], None]:
    """Another number of a schema."""

    def apply(folder: Path) -> None:
        document = load(folder, name)
        document["schema"] = document["schema"].replace("/1", "/2")
        store(folder, name, document)
        bind(folder)

    return apply


def other_predicate(folder: Path) -> None:
    certificate = load(folder, contents.CERTIFICATE)
    certificate["predicateType"] = "https://in-toto.io/attestation/vuln/v0.1"
    store(folder, contents.CERTIFICATE, certificate)


def deep(levels: int) -> bytes:
    return b'{"name": ' + b"[" * levels + b"]" * levels + b"}"


def replace(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new))
        bind(folder)

    return apply


def in_utf_16(name: str) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        bind(folder)
        (folder / name).write_text(text, encoding="utf-16")

    return apply


def records_again(folder: Path) -> None:
    content = (folder / RAW).read_bytes()
    (folder / RAW).write_bytes(content + content[len(raw.MAGIC) :])
    bind(folder)


def one_file(folder: Path) -> None:
    (folder / "runs/1/raw.bin").unlink()
    os.link(folder / RAW, folder / "runs/1/raw.bin")
    bind(folder)


BOMB = zlib.compress(bytes(64 << 20))
MESSAGE = encode({"case": "0123456789ab"})
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "raw results cut within a record": (cut(RAW, 5000), f"{RAW}: record"),
    "raw results cut within a header": (cut(RAW, len(raw.MAGIC) + 3), "the file ends within it"),
    "raw results that are empty": (write(RAW, b""), f"{RAW}: must start with"),
    "raw results of another version": (write(RAW, b"syncbn-raw/2\n"), f"{RAW}: must start with"),
    "a record that expands": (write(RAW, record(BOMB, 100)), "must expand to 100 bytes"),
    "a record that is huge": (write(RAW, record(BOMB, 2**32 - 1)), "must have at most"),
    "a record that is no stream": (write(RAW, record(b"x" * 9, 9)), f"{RAW}: record 0: Error"),
    "a record that is no message": (
        write(RAW, record(zlib.compress(b"x" * 9), 9)),
        f"{RAW}: record 0: a message must have",
    ),
    "a record without its fields": (
        write(RAW, record(zlib.compress(MESSAGE), len(MESSAGE))),
        "'crashed' is a required property",
    ),
    "a report cut in the middle": (
        cut("runs/2/report.json", 999),
        "runs/2/report.json: is not JSON",
    ),
    "a report of another version": (
        version("runs/2/report.json"),
        "'syncbn-report/1' was expected",
    ),
    "an environment of another version": (
        version("environment.json"),
        "'syncbn-environment/1' was expected",
    ),
    "another predicate": (other_predicate, "certificate.json: predicateType:"),
    "a log that is no JSON": (write("log.jsonl", b"{\n"), "log.jsonl: line 1: is not JSON"),
    "a log with lists for lines": (write("log.jsonl", b"[]\n" * 30), "log.jsonl: line 1"),
    "a log with 900 levels": (write("log.jsonl", deep(900)), "log.jsonl: line 1: "),
    "a huge signature": (
        lambda folder: (folder / "certificate.json.sig").write_bytes(bytes(200_000)),
        "certificate.json.sig: must have at most",
    ),
    "NaN": (write("product.json", b'{"name": NaN}'), "product.json: is not JSON: NaN"),
    "a name twice": (write("product.json", b'{"name": "a", "name": "b"}'), "is twice in an object"),
    "no UTF-8": (write("product.json", b"\xff\xfe\xfd"), "product.json: is not JSON"),
    "300 levels": (write("product.json", deep(300)), "levels of lists and objects"),
    "200,000 levels": (write("product.json", deep(200_000)), "levels of lists and objects"),
    "control characters": (
        write("product.json", json.dumps({"name": "\x1b[2J", "vendor": "\u202e"}).encode()),
        "product.json: ",
    ),
    "a line feed at the end of a name": (
        replace("product.json", b'"Layer"', b'"Layer\\n"'),
        r"product.json: name: 'Layer\n' does not match",
    ),
    "a number of 5,000 digits": (
        write("log.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n"),
        "log.jsonl: line 1: is not JSON: Exceeds the limit",
    ),
    "a number that is infinite": (
        replace("log.jsonl", b'"ratio": null', b'"ratio": 1e999'),
        ".ratio is Infinity, not null",
    ),
    "a certificate in UTF-16": (in_utf_16("certificate.json"), "certificate.json: is not JSON"),
    "an environment in UTF-16": (in_utf_16("environment.json"), "environment.json: is not JSON"),
    "a byte order mark": (
        replace("product.json", b"{", b"\xef\xbb\xbf{"),
        "product.json: is not JSON: Unexpected UTF-8 BOM",
    ),
    "a log whose lines end with carriage returns": (
        replace("log.jsonl", b"\n", b"\r"),
        "log.jsonl: line 1: is not JSON: Extra data",
    ),
    "a text that is one line": (
        replace("CERTIFICATE.md", b"\n", b"\x0c"),
        "CERTIFICATE.md: line 1 is",
    ),
    "a text whose lines end as Unicode has it": (
        replace("CERTIFICATE.md", b"\n", "\u2028".encode()),
        "CERTIFICATE.md: line 1 is",
    ),
    "a text that is no UTF-8": (
        replace("CERTIFICATE.md", b"# Certificate", b"# Certificate\xff"),
        r"CERTIFICATE.md: line 1 is",
    ),
    "an empty folder": (
        lambda folder: (folder / "runs/2/empty").mkdir(),
        "runs/2/empty: is no folder of the package",
    ),
    "a folder in the place of a signature": (
        lambda folder: (folder / "certificate.json.sig").mkdir(),
        "certificate.json.sig: is no folder of the package",
    ),
    "a package in the package": (
        lambda folder: shutil.copytree(folder / "runs", folder / "runs/runs"),
        "runs/runs/2/raw.bin: is no file of the package",
    ),
    "a name that differs in case": (
        lambda folder: shutil.copy(folder / "certificate.json", folder / "Certificate.json"),
        "Certificate.json: is no file of the package",
    ),
    "a name that is no UTF-8": (
        lambda folder: os.mkdir(os.fsencode(folder) + b"/\xff"),
        r"\udcff: is no folder of the package",
    ),
    "one file for two runs": (one_file, "runs/1/raw.bin: case"),
    "the records of a run again": (records_again, "is there again"),
    "a link to a file": (link("product.json", "/etc/hostname"), "product.json: missing"),
    "a link to a folder": (link("runs/2", "/etc"), "runs/2: is no regular file"),
    "a link in a loop": (link("runs/2", ".."), "runs/2: is no regular file"),
    "a pipe": (pipe, f"{RAW}: is no regular file"),
    "a file of 1 TB": (
        lambda folder: os.truncate(folder / RAW, 2**40),
        f"{RAW} must be a file of at most",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_package_is_refused_by_name(name: str, package: Path) -> None:
    change, reason = HOSTILE[name]
    change(package)
    before = sorted(path for path in package.parent.rglob("*"))
    found = verify(package, plan=PLAN)
    assert sum("is there again" in one for one in found.refused) <= 1
    assert any(reason in one for one in found.refused), found.refused[:10]
    assert not any("\x1b" in one or "\u202e" in one for one in found.refused)
    assert sorted(path for path in package.parent.rglob("*")) == before


def test_what_is_no_package(tmp_path: Path, package: Path) -> None:
    for folder, reason in (
        (tmp_path / "missing", "No such file"),
        (package / "product.json", "Not a directory"),
        (package / "runs", "holds no package: it has no file certificate.json"),
    ):
        with pytest.raises(UnreadableError, match=reason):
            verify(folder, plan=PLAN)
    for number in range(1001):
        (tmp_path / f"{number}").mkdir()
    with pytest.raises(UnreadableError, match="at most 1000 entries"):
        verify(tmp_path, plan=PLAN)


def test_exit_statuses(passed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no package" in capsys.readouterr().err
    assert main(["verify", str(passed)]) == 1  # a package of few cases is no certificate
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("refused: environment.json: plan.name is")


def test_a_refusal_that_is_not_read_is_one(passed: Path) -> None:
    """As by `verify DIR | head -0`."""
    read, write_end = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "syncbn.conformance", "verify", str(passed)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


def key(folder: Path, name: str) -> Path:
    path = folder / name
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(path)]
    subprocess.run(command, check=True)
    return path


@needs_keys
def test_signatures(package: Path, tmp_path: Path) -> None:
    mine, others = key(tmp_path, "mine"), key(tmp_path, "others")
    signers = tmp_path / "signers"
    signers.write_text(f"vendor@example.org {mine.with_suffix('.pub').read_text()}")
    certificate = package / contents.CERTIFICATE

    def refused(allowed: Path | None = signers) -> list[str]:
        return verify(package, allowed, plan=PLAN).refused

    assert "missing, the package is not signed" in refused()[0]
    signature.sign(certificate, mine)
    assert refused() == refused(None) == []
    assert verify(package, signers, plan=PLAN).notes[0] == "signed by vendor@example.org"
    sig = package / "certificate.json.sig"
    good = sig.read_bytes()

    sig.unlink()
    signature.sign(certificate, others)
    assert refused() != []
    assert refused(None) == []  # some key made it

    sig.write_bytes(good)
    document = load(package, contents.CERTIFICATE)
    store(package, contents.CERTIFICATE, document | {"subject": document["subject"][:-1]})
    assert "certificate.json.sig: ssh-keygen" in refused()[0]
    assert "certificate.json.sig: ssh-keygen" in refused(None)[0]

    sig.write_bytes(b"not a signature")
    assert "certificate.json.sig: ssh-keygen" in refused(None)[0]
    sig.unlink()
    subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", mine, "-n", "file", certificate],
        check=True,
        capture_output=True,
    )
    assert "certificate.json.sig: ssh-keygen" in refused(None)[0]  # for another purpose


@needs_keys
def test_a_key_that_cannot_sign(package: Path, tmp_path: Path) -> None:
    with pytest.raises(signature.SignatureError, match="key must be a file"):
        signature.sign(package / contents.CERTIFICATE, tmp_path / "missing")
    (tmp_path / "bad").write_text("no key")
    with pytest.raises(signature.SignatureError, match="ssh-keygen sign: "):
        signature.sign(package / contents.CERTIFICATE, tmp_path / "bad")
