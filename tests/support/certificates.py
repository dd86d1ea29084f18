"""What QEMU wants in a directory for migrations over TLS (`tls-creds-x509`, `tls-creds-psk`)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from refault.lab.qmp_client import QmpClient


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


def make_key(place: Path) -> None:
    """A key that both ends have."""
    (place / "keys.psk").write_text("qemu:" + "5a" * 32 + "\n")


async def set_tls(source: QmpClient, destination: QmpClient, kind: str, place: Path) -> None:
    """Both QEMUs' migrations are to speak TLS from here on; `kind`: x509 or psk."""
    for qmp, endpoint in ((source, "client"), (destination, "server")):
        tls = {"qom-type": f"tls-creds-{kind}", "id": "tls0", "dir": str(place)}
        if kind == "psk" and endpoint == "client":
            tls["username"] = "qemu"
        await qmp.execute("object-add", {**tls, "endpoint": endpoint})
        await qmp.execute("migrate-set-parameters", {"tls-creds": "tls0"})


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
