"""What is shown holds no signature, key or password, wherever in a message one stands."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.build_dataset import BuildDataset
from jobs.support.run_record import recorded
from jobs.support.settings import parse
from pipeline.redaction import Redacting, describe, redact

URL_SAFE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789%+/-._~"

# Every secret begins like this, so that nothing else in a message can be taken for it.
secrets = st.text(URL_SAFE, min_size=8, max_size=60).map(lambda text: f"hUsH{text}")

FORMS = (
    "https://a.blob.core.windows.net/c/b.tif?st=2026-01-01T00%3A00%3A00Z&se=2026&sp=rl&sv=2024&sr=c&sig={0}",
    "https://a.blob.core.windows.net/c/b.tif?sig={0}&se=2026",
    "/vsicurl/https://a.blob.core.windows.net/c/b.tif?sp=rl&sig={0}",
    "GET /c/b.tif?sv=1&sig={0} HTTP/1.1",
    "st=2026-01-01T00%3A00%3A00Z&se=2026-01-02&sp=rl&sig={0}",
    "https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2F1&X-Amz-Signature={0}",
    "X-Amz-Security-Token={0}&X-Amz-Signature={0}",
    "https://b.s3.amazonaws.com/k?AWSAccessKeyId={0}&Signature={0}&Expires=1",
    "https://storage.googleapis.com/b/k?X-Goog-Signature={0}",
    "BlobEndpoint=http://h/a;AccountName=a;AccountKey={0};EndpointSuffix=x",
    "Authorization: Bearer {0}",
    "{{'Authorization': 'AWS4-HMAC-SHA256 Credential={0}'}}",
    "Ocp-Apim-Subscription-Key: {0}",
    '{{"msft:expiry": "2026-01-01T00:00:00Z", "token": "{0}"}}',
    "aws_secret_access_key={0}",
    "AZURE_STORAGE_SAS_TOKEN={0}",
    "PC_SDK_SUBSCRIPTION_KEY={0}",
)


@given(st.sampled_from(FORMS), secrets, st.sampled_from(["", " ", "\n", '"', "'", "<", "("]), st.booleans())
def test_no_secret_is_left_of_any_form_that_libraries_write(form: str, secret: str, edge: str, twice: bool) -> None:
    message = f"could not read {edge}{form.format(secret)}{edge} (HTTP 403)"
    if twice:
        message = f"{message}; caused by: {message}"
    shown = redact(message)
    assert "hUsH" not in shown
    assert "could not read" in shown
    assert redact(shown) == shown


@given(st.sampled_from(["user:{0}@host", "{0}@host", "user:{0}@127.0.0.1:9000"]), secrets)
def test_no_user_is_left_in_a_url(form: str, secret: str) -> None:
    url = f"http://{form.format(secret.replace('/', ''))}/path"
    assert "hUsH" not in redact(f"GET {url} failed")
    assert redact(url).endswith("/path")


@given(secrets)
def test_a_url_inside_a_url_hides_its_parameters_too(secret: str) -> None:
    user = secret.replace("/", "")
    inner = quote(f"https://user:{user}@a.blob.core.windows.net/c/b.tif?se=2026&sig={secret}", safe="")
    assert "hUsH" not in redact(f"/vsicurl?max_retry=3&url={inner} does not exist")
    assert "hUsH" not in redact(f"url={inner} does not exist")


@pytest.mark.parametrize(
    "text",
    [
        "cell 32632-0-17, item S2A_MSIL2A_20230601T101601, band B02: Read failed. See previous exception",
        "python -m jobs.build_dataset region=9.1,48.2,9.6,48.5 period=2023-06/2023-08 store=s3://bucket/chips seed=7",
        "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/32/U/MV/B02.tif: HTTP response code: 503",
        "what now? nothing.",
        "13 of 40 shards, 1.2/s, 22 s left",
        "a=1 & b=2; e = mc^2; resume=true; tokens=4; test=ok",
        "az://container/chips: the lease was lost to host-17:4242",
        "10:15 @ 11:20, me@example.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def nested() -> Exception:
    """As rasterio raises: what failed, and with which URL, only in the cause."""
    try:
        try:
            try:
                raise OSError("https://h/x?sig=hUsH1 gave 403")
            except OSError as error:
                raise ValueError("token=hUsH2") from error
        except ValueError:
            raise RuntimeError("while handling Authorization: Bearer hUsH3")  # noqa: B904  # the context is the point
    except RuntimeError as error:
        return ExceptionGroup("several", [error, KeyError("sig=hUsH4")])


def test_an_error_is_told_with_all_of_its_causes_and_without_their_secrets() -> None:
    text = describe(nested())
    assert "hUsH" not in text
    assert "\n" not in text
    for part in ("several", "RuntimeError: while", "ValueError", "OSError: https://h/x?… gave 403", "KeyError"):
        assert part in text
    loop = ValueError("a")
    loop.__cause__ = loop
    assert describe(loop) == "ValueError: a"


def test_a_log_holds_no_secret_also_not_in_its_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Redacting())
    log = logging.Logger("of this test")  # not one that others share
    log.addHandler(handler)
    log.warning("reading %s again in %d s", "https://h/x?sig=hUsH", 3)
    log.error("failed", exc_info=nested())
    log.info("plain")
    text = stream.getvalue()
    assert "hUsH" not in text
    assert "reading https://h/x?… again in 3 s" in text
    assert "Traceback" in text
    assert text.endswith("plain\n")


def fail(settings: BuildDataset, url: str) -> None:
    """A run that tells of a URL wherever it can."""
    with recorded(settings, job="build", output=settings.store) as record:
        record.inputs["items"] = [url]
        record.results["errors"] = {"first": f"could not read {url}", "count": 1}
        raise OSError(url)


def test_a_run_record_holds_no_secret_of_its_settings_results_or_error(tmp_path: Path) -> None:
    url = "https://user:hUsH@catalog/stac?sig=hUsH"
    settings = parse(BuildDataset, [f"archive={url}", "region=1,2,3,4", "period=2023", f"store={tmp_path / 'store'}"])
    with pytest.raises(OSError, match="hUsH"):
        fail(settings, url)
    text = (tmp_path / "store.run" / "run.json").read_text()
    assert "hUsH" not in text
    written = json.loads(text)
    assert written["settings"]["archive"] == written["inputs"]["items"][0] == "https://…@catalog/stac?…"
    assert written["settings"]["splits"]["val_fraction"] == 0.1
    assert written["results"]["errors"]["count"] == 1
    assert written["status"] == "failed"
