"""Certificates: mutual TLS, both sides known to one authority."""

from __future__ import annotations

import os
import ssl

from cowstore.errors import InvalidError

Path_ = str | os.PathLike[str]


def tls_context(certificate: Path_, key: Path_, authority: Path_) -> ssl.SSLContext:
    """What the server shows, and what it asks of its clients: a certificate of the same authority.

    Args:
        certificate: The server's certificate, and its chain, in PEM.
        key: Its private key in PEM.
        authority: The certificates that clients' are checked against, in PEM.

    Raises:
        InvalidError: One of them cannot be read, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        # An encrypted key fails: nobody is there to be asked for its password.
        context.load_cert_chain(certificate, key, password="")
        context.load_verify_locations(authority)
    except (OSError, ValueError) as error:
        names = ", ".join(str(path) for path in (certificate, key, authority))
        raise InvalidError(f"TLS cannot be set up with {names}: {error}", hint="give PEM files") from error
    return context
