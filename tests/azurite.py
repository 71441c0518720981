"""Planetary Computer's storage on this machine: Azurite, which checks every signature, under the hosts' real names.

Names such as `account.blob.core.windows.net` are reached through a proxy, which answers for them with a certificate
of its own; so hrefs are what they are in the archive, and nothing is changed on the machine.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from azure.storage.blob import BlobServiceClient, generate_container_sas
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.conftest import require_server
from tests.seaweed import free_ports
from tests.token_server import TokenServer, token_server

DOMAIN = ".blob.core.windows.net"

Fault = Callable[[str, str, Mapping[str, str]], tuple[int, Mapping[str, str]] | None]
"""(method, path with parameters, headers) -> status and headers to answer with, or None to let it pass."""


@dataclass(frozen=True)
class Request:
    """One request that reached the storage's name."""

    method: str
    host: str
    path: str
    signed: bool
    status: int


@dataclass
class AzuriteLab:
    """Storage accounts, the giver of their tokens, and how a client's environment must be to reach them."""

    folder: Path
    keys: Mapping[str, str]
    """Account -> key."""

    tokens: TokenServer
    azurite_port: int = 0
    proxy_port: int = 0
    fault: Fault | None = None
    latency_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def environment(self) -> dict[str, str]:
        """For GDAL, requests and the SDK."""
        proxy, authority = f"http://127.0.0.1:{self.proxy_port}", str(self.folder / "authority.pem")
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
        exceptions = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        trust = dict.fromkeys(("GDAL_CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), authority)
        return {**proxies, **exceptions, **trust, "PC_SDK_SAS_URL": self.tokens.url}

    def store_environment(self, account: str) -> dict[str, str]:
        """For a chip store in an account."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": account,
            "AZURE_STORAGE_ACCOUNT_KEY": self.keys[account],
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.azurite_port}/{account}",
            "AZURE_ALLOW_HTTP": "true",
        }

    def create_container(self, account: str, container: str) -> None:
        with self._service(account) as service:
            service.create_container(container)

    def upload(self, account: str, container: str, name: str, path: Path) -> str:
        """Put a file there; its href."""
        with self._service(account) as service, path.open("rb") as content:
            service.get_blob_client(container, name).upload_blob(content, overwrite=True)
        return f"https://{account}{DOMAIN}/{container}/{name}"

    def token(self, account: str, container: str, expires: datetime) -> str:
        """What Planetary Computer's token service would give: to read and to list."""
        return str(
            generate_container_sas(
                account,
                container,
                account_key=self.keys[account],
                permission="rl",
                # No two are the same, not even of one second.
                start=datetime.now(UTC) - timedelta(minutes=5, seconds=next(self._numbers)),
                expiry=expires,
            )
        )

    def _service(self, account: str) -> BlobServiceClient:
        return BlobServiceClient(f"http://127.0.0.1:{self.azurite_port}/{account}", credential=self.keys[account])


def first_byte(headers: Mapping[str, str]) -> int:
    """Where what a request asks for begins; beyond 0 it is pixels, not a file's header."""
    return int(headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])


def azurite_main() -> Path | None:
    """Azurite's program for blobs, installed by npm."""
    if named := os.environ.get("TWINLOOK_AZURITE"):
        return Path(named)
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return None
    root = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
    main = Path(root) / "azurite/dist/src/blob/main.js"
    return main if main.exists() else None


@contextmanager
def azurite_lab(folder: Path, accounts: Mapping[str, list[str]]) -> Iterator[AzuriteLab]:
    """Accounts with their containers, ended at the end."""
    main = azurite_main()
    require_server(main is not None, "needs Azurite: npm install -g azurite, or its blob/main.js in $TWINLOOK_AZURITE")
    folder.mkdir(parents=True, exist_ok=True)
    write_certificates(folder, f"*{DOMAIN}")
    keys = {account: base64.b64encode(b"hUsH" + secrets.token_bytes(60)).decode() for account in accounts}
    with token_server() as tokens:
        lab = AzuriteLab(folder, keys, tokens, azurite_port=free_ports(1)[0])
        tokens.issue = lab.token
        with (
            azurite(main, lab),
            server(_storage(lab), tls=folder) as storage_port,
            server(_proxy(storage_port)) as port,
        ):
            lab.proxy_port = port
            for account, containers in accounts.items():
                for container in containers:
                    lab.create_container(account, container)
            yield lab


@contextmanager
def azurite(main: Path | None, lab: AzuriteLab) -> Iterator[None]:
    """The process."""
    options = {"blobHost": "127.0.0.1", "blobPort": lab.azurite_port, "location": lab.folder / "blobs"}
    switches = ("--silent", "--skipApiVersionCheck", "--disableTelemetry")
    with (lab.folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["node", str(main), *(f"--{name}={value}" for name, value in options.items()), *switches],
            env={**os.environ, "AZURITE_ACCOUNTS": ";".join(f"{name}:{key}" for name, key in lab.keys.items())},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", lab.azurite_port)) == 0:
                    break
            assert process.poll() is None, (lab.folder / "log").read_text()
            assert time.monotonic() < end, "Azurite did not start"
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def server(handler: type[BaseHTTPRequestHandler], *, tls: Path | None = None) -> Iterator[int]:
    """A server of many threads on a free port."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "leaf.pem", tls / "leaf.key")
        # The handshake is for the thread of the connection, not for the one that accepts.
        running.socket = context.wrap_socket(running.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield running.server_port
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def _storage(lab: AzuriteLab) -> type[BaseHTTPRequestHandler]:
    """Passes requests on to Azurite, counts them, and answers itself where a fault is wanted."""

    class Storage(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(lab.latency_s)
            wrong = lab.fault and lab.fault(self.command, self.path, self.headers)
            status, headers, content = (*wrong, b"") if wrong else self.asked(body)
            host, _, path = self.headers["Host"], None, self.path.partition("?")[0]
            lab.requests.append(Request(self.command, host, path, "sig=" in self.path, status))
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = headers.get("content-length", len(content)) if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_DELETE = pass_on

        def asked(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", lab.azurite_port, timeout=30)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
            finally:
                connection.close()

        def handle(self) -> None:
            try:
                super().handle()
            except (ConnectionError, ssl.SSLError):
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Storage


def _proxy(storage_port: int) -> type[BaseHTTPRequestHandler]:
    """Connects whoever asks for a storage account with our storage, and nobody with anything else."""

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_CONNECT(self) -> None:
            if not self.path.partition(":")[0].endswith(DOMAIN):
                self.send_error(403, "no such host here")
                return
            self.send_response_only(200)
            self.end_headers()
            self.close_connection = True
            with socket.create_connection(("127.0.0.1", storage_port)) as there:
                back = threading.Thread(target=_copy, args=(there, self.connection), daemon=True)
                back.start()
                _copy(self.connection, there)
                back.join()

        def log_message(self, *_: Any) -> None:
            pass

    return Proxy


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def write_certificates(folder: Path, name: str) -> None:
    """`authority.pem` to trust, and `leaf.pem` with `leaf.key` for a server of this name; valid for a day."""
    now = datetime.now(UTC)
    authority_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of a test")])

    def unsigned(subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )

    uses = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    authority = unsigned(authority_name, authority_key, is_authority=True).add_extension(uses, critical=True)
    leaf = (
        unsigned(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "storage")]), leaf_key, is_authority=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    pem = serialization.Encoding.PEM
    for file, builder in (("authority.pem", authority), ("leaf.pem", leaf)):
        (folder / file).write_bytes(builder.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    key = leaf_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "leaf.key").write_bytes(key)
