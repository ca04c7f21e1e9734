"""TLS to the checked address, with the certificate of the name."""

import asyncio
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lmaas.webhooks.sending import Sender
from lmaas.webhooks.targets import Targets, networks

LOCAL = Targets(networks("127.0.0.0/8"))


def certificate(folder: Path, *names: str) -> Path:
    """Write a certificate of its own authority for these names, with its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    alternatives = [x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names]
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM) + private)
    return path


async def to_localhost(host: str, port: int) -> Sequence[str]:
    assert host.endswith(".example")
    assert port
    return ["127.0.0.1"]


@pytest.mark.parametrize(
    ("of", "url", "error"),
    [
        ("hooks.example", "https://hooks.example:{port}/", None),
        ("127.0.0.1", "https://127.0.0.1:{port}/", None),
        ("other.example", "https://hooks.example:{port}/", "The TLS certificate of the target is not valid"),
        ("127.0.0.1", "https://hooks.example:{port}/", "The TLS certificate of the target is not valid"),
    ],
)
async def test_the_certificate_is_that_of_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str, url: str, error: str | None
) -> None:
    path, asked = certificate(tmp_path, of), list[str | None]()
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.sni_callback = lambda _, name, __: asked.append(name)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 Done\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server, Sender(LOCAL, to_localhost) as sender:
        sent = await sender.send(url.format(port=port), "evt_1", b"{}", [b"key"])
    if error is None:
        assert (sent.status_code, sent.error) == (204, None)
    else:
        assert (sent.error or "").startswith(error)
        assert sent.status_code is None
    assert set(asked) <= {"hooks.example", None}
