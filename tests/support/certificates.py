"""X.509 certificates as QEMU wants them in a directory (`tls-creds-x509`), made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_certificates(place: Path, names: str) -> None:
    """An authority in `place`, and of it a server and a client with these names (subjectAltName)."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout")
    ca, ca_key = place / "ca-cert.pem", place / "ca-key.pem"
    _openssl("req", "-x509", *key, ca_key, "-subj", "/CN=lab", "-out", ca)
    for end, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        extensions, request = place / f"{end}.ext", place / f"{end}.csr"
        extensions.write_text(
            f"subjectAltName={names}\nextendedKeyUsage={usage}\nkeyUsage=digitalSignature\n"
        )
        _openssl("req", *key, place / f"{end}-key.pem", "-subj", f"/CN={end}", "-out", request)
        signed = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-extfile", extensions)
        _openssl("x509", "-req", "-in", request, *signed, "-out", place / f"{end}-cert.pem")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
