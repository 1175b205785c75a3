"""Certificates for tests, made by the program `openssl`."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

_NEW = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "30"]


class Authority:
    """Signs certificates.

    Args:
        directory: Where everything goes.
        name: Of the authority.

    Attributes:
        certificate: Its own.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self.certificate = self._make(name, "-nodes")[0]

    def _make(self, name: str, *words: str) -> tuple[Path, Path]:
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        files = ["-out", str(certificate), "-keyout", str(key)]
        subprocess.run([*_NEW, *words, *files, "-subj", f"/CN={name}"], check=True, capture_output=True)
        return certificate, key

    def sign(self, name: str, *words: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        own = self._directory / f"{self._name}"
        extensions = ["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
        signed = ["-CA", f"{own}.pem", "-CAkey", f"{own}.key"]
        return self._make(name, *(words or ["-nodes"]), *signed, *extensions)

    def client_context(self, identity: tuple[Path, Path] | None = None) -> ssl.SSLContext:
        """What a client needs that trusts this authority, with its own certificate if it has one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.certificate)
        if identity is not None:
            context.load_cert_chain(*identity)
        return context
