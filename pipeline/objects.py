"""Files at a URL: one way to a local disk, S3, Azure Blob and Google Cloud Storage.

A write is seen whole or not at all, and can be told to fail where something already is; everything that must
survive a kill or a second writer rests on these two.

Credentials and endpoints are taken from the environment of each process, the driver's and the cluster's nodes', under
the names that other tools use. S3: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION` (or a role of the
machine); for servers other than Amazon's `AWS_ENDPOINT`, and `AWS_ALLOW_HTTP=true` where it has no TLS. Azure:
`AZURE_STORAGE_ACCOUNT_NAME` with `AZURE_STORAGE_ACCOUNT_KEY` or `AZURE_STORAGE_SAS_TOKEN` (or an identity of the
machine); `AZURE_STORAGE_ENDPOINT` and `AZURE_ALLOW_HTTP` likewise. Google: `GOOGLE_SERVICE_ACCOUNT`.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store, from_url
from zarr.storage import ObjectStore

from pipeline.redaction import redact as redact

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, RetryConfig

T = TypeVar("T")

Remote = S3Store | GCSStore | AzureStore | MemoryStore

SCHEMES = ("s3", "az", "gs")
"""Object stores by URL scheme; anything without ``://`` is a local path."""

_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP"}
"""Environment variables that permit an endpoint without TLS, for servers on one's own machine."""

_SINGLE_PUT_BYTES = 1 << 30
"""Below this an object goes up in one request: a killed upload then leaves nothing behind to clean up."""

RETRY_S = 90.0
"""For so long a request is repeated to an object store that does not answer or is in trouble, seconds."""

_REFUSED = re.compile(r"status code: 40[13]\b")
_CREDENTIALS = "check the credentials in the environment of this process and of the cluster's nodes"

_CONCURRENT_REQUESTS = 16
_ROWS_PER_GROUP = 1 << 16


class Objects:
    """What lies under one URL. Credentials come from the environment, never from the URL or a pickle."""

    def __init__(self, url: str, store: Remote | None) -> None:
        self.url = url
        self._remote = store

    @classmethod
    def at(cls, url: str | Path) -> Objects:
        """Whatever lies, or will lie, under a local path or an ``s3://``, ``az://`` or ``gs://`` URL.

        Raises:
            ValueError: Another scheme, or a URL that carries credentials.
        """
        text = str(url).rstrip("/") or "/"
        if "://" not in text:
            return cls(str(Path(text).expanduser().absolute()), None)
        parts = urlsplit(text)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"{redact(text)}: expected a local path or a URL of {', '.join(SCHEMES)}")
        if parts.query or parts.username:
            raise ValueError(f"{redact(text)}: credentials belong into the environment, not into the URL")
        with _plain_errors(text, "open"):
            # A shard of 93 MB does not pass a slow line within the library's 30 s. With options of ours the library
            # leaves this one of its variables unread.
            allow_http = os.environ.get(_ALLOW_HTTP[parts.scheme], "").lower() in ("1", "true")
            store = from_url(
                text, client_options={"timeout": "10m", "allow_http": allow_http}, retry_config=_retries(RETRY_S)
            )
        assert isinstance(store, S3Store | GCSStore | AzureStore), store
        return cls(text, store)

    @classmethod
    def in_memory(cls) -> Objects:
        """An empty place in this process, to prepare what is then put elsewhere; it does not pickle."""
        return cls("memory", MemoryStore())

    def child(self, path: str) -> Objects:
        """What lies under a path below this one."""
        return Objects.at(f"{self.url}/{path}")

    def file(self, path: str) -> Path | None:
        """The file that an object is on a local disk, to be read in parts; None in an object store."""
        return Path(self.url, path) if self._remote is None else None

    def get(self, path: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: There is none.
        """
        return bytes(self.view(path))

    def view(self, path: str) -> memoryview:
        """The whole object, as `get`, without a copy for Python; for large ones."""
        with _plain_errors(self._name(path), "read"):
            return memoryview(obstore.get(self._store(), path).bytes())

    def get_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Parts of an object, as (start, end) in bytes; near ones share a request."""
        starts, ends = zip(*ranges, strict=True)
        with _plain_errors(self._name(path), "read"):
            return [bytes(part) for part in obstore.get_ranges(self._store(), path, starts=starts, ends=ends)]

    def size(self, path: str) -> int:
        """Bytes of an object."""
        with _plain_errors(self._name(path), "look up"):
            return int(obstore.head(self._store(), path)["size"])

    def put(self, path: str, data: bytes, *, create: bool = False) -> None:
        """Write an object whole: readers see the old one or the new one, also if this process is killed.

        Raises:
            FileExistsError: With `create`, where something is; of several writers exactly one wins.
        """
        with _plain_errors(self._name(path), "write"):
            obstore.put(
                self._store(write=True),
                path,
                data,
                mode="create" if create else "overwrite",
                use_multipart=not create and len(data) >= _SINGLE_PUT_BYTES,
            )

    def exists(self, path: str) -> bool:
        """Whether there is an object of this name (a folder is none)."""
        try:
            with _plain_errors(self._name(path), "look up"):
                obstore.head(self._store(), path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Paths of all objects under a folder, at any depth, sorted."""
        try:
            with _plain_errors(self._name(prefix), "list"):
                pages = obstore.list(self._store(), prefix or None)
                return sorted(str(entry["path"]) for page in pages for entry in page)
        except FileNotFoundError:
            return []

    def folders(self, prefix: str = "") -> Sequence[str]:
        """Names of the folders right under a folder, sorted; looks at no object inside them."""
        try:
            with _plain_errors(self._name(prefix), "list"):
                found = obstore.list_with_delimiter(self._store(), prefix or None)
                return sorted(str(path).rpartition("/")[2] for path in found["common_prefixes"])
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        """Remove an object; it is well if there is none."""
        try:
            with _plain_errors(self._name(path), "delete"):
                obstore.delete(self._store(), path)
        except FileNotFoundError:
            return

    def get_json(self, path: str) -> dict[str, Any]:
        """The object of a JSON file."""
        content = json.loads(self.get(path))
        if not isinstance(content, dict):
            raise ValueError(f"{self._name(path)}: expected a JSON object, got a {type(content).__name__}")
        return content

    def put_json(self, path: str, content: dict[str, Any], *, create: bool = False) -> None:
        """Write a JSON file for people: keys sorted, indented; equal content has equal bytes."""
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        self.put(path, f"{text}\n".encode(), create=create)

    def get_table(self, path: str, *, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or some of its columns."""
        return pq.read_table(pa.BufferReader(self.get(path)), columns=None if columns is None else [*columns])

    def put_table(self, path: str, table: pa.Table) -> bytes:
        """Write a Parquet file and return its bytes; equal rows give equal bytes, however chunked."""
        sink = io.BytesIO()
        pq.write_table(table.combine_chunks(), sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
        data = sink.getvalue()
        self.put(path, data)
        return data

    def zarr_store(self, *, read_only: bool) -> ObjectStore[Any]:
        """The same place as a store of zarr-python's."""
        return ObjectStore(self._store(write=not read_only), read_only=read_only)

    def __repr__(self) -> str:
        return f"Objects({self.url!r})"

    def __reduce__(self) -> tuple[Callable[[str], Objects], tuple[str]]:
        return Objects.at, (self.url,)

    def _store(self, *, write: bool = False) -> Remote | LocalStore:
        """The library's handle; a local folder is made by the first write, not by looking."""
        if self._remote is not None:
            return self._remote
        if write:
            Path(self.url).mkdir(parents=True, exist_ok=True)
        elif not Path(self.url).is_dir():
            raise FileNotFoundError(self.url)
        return LocalStore(self.url)

    def _name(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url


def concurrently(function: Callable[[Any], T], arguments: Iterable[Any]) -> list[T]:
    """Call a function that waits for a store with many arguments at once; results in their order."""
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        return list(pool.map(function, arguments))


def _retries(seconds: float) -> RetryConfig:
    backoff: BackoffConfig = {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2}
    return {"max_retries": 1000, "retry_timeout": timedelta(seconds=seconds), "backoff": backoff}


@contextmanager
def _plain_errors(name: str, action: str) -> Iterator[None]:
    """Turn the library's errors into Python's own, one line each, without signatures."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: not found") from None
    except AlreadyExistsError:
        raise FileExistsError(f"{name}: exists already") from None
    except BaseError as error:
        reason = redact(str(error).partition("\n")[0])
        # Listing has no error of its own for this.
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(reason):
            raise PermissionError(f"not allowed to {action} {name}: {reason}; {_CREDENTIALS}") from None
        raise OSError(f"could not {action} {name}: {reason}") from None
