"""One way to open storage; what goes wrong there is said in words; outages are waited for."""

import os
import re

import pytest
from pyarrow import fs
from storage import BUCKET, refusing, s3

from sddit.errors import StorageError, UsageError
from sddit.filesystem import in_words, is_outage, is_remote, open_filesystem, patiently


@pytest.fixture(scope="module")
def client():
    with s3() as client:
        yield client


def test_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "some/folder"
    for uri in ("some/folder", "some/folder/", "~/some/folder", folder.as_uri(), folder):
        filesystem, path = open_filesystem(uri)
        assert isinstance(filesystem, fs.LocalFileSystem) and path == str(folder)
        assert not is_remote(uri)


def test_object_storage(client):
    filesystem, path = open_filesystem(f"s3://{BUCKET}/some/folder/")
    assert (filesystem.type_name, path) == ("s3", f"{BUCKET}/some/folder")
    with filesystem.open_output_stream(f"{path}/file") as file:
        file.write(b"content")
    assert client.get_object(Bucket=BUCKET, Key="some/folder/file")["Body"].read() == b"content"
    assert is_remote("s3://bucket/folder") and is_remote("gs://bucket/folder") and is_remote("memory://folder")


def test_any_scheme_of_fsspec():
    import fsspec

    fsspec.filesystem("memory").pipe("/folder/file", b"content")
    filesystem, path = open_filesystem("memory://folder/")
    with filesystem.open_input_file(f"{path}/file") as file:
        assert file.read() == b"content"


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("gss://bucket/x", UsageError, r"Unknown scheme 'gss' in 'gss://bucket/x'. Did you mean 'gs'\?"),
        ("s3://", UsageError, "names no place. Give a bucket and a folder, as in s3://bucket/folder"),
        ("s3://a bucket/x", UsageError, "is not an address: Cannot parse URI"),
        ("oci://bucket/x", StorageError, "Cannot open oci://bucket/x: Install ocifs to .*on every node"),
    ],
)
def test_an_address_that_cannot_be_opened(uri, error, message):
    with pytest.raises(error, match=message):
        open_filesystem(uri)


def read(uri):
    filesystem, path = open_filesystem(uri)
    with pytest.raises(OSError) as caught:
        filesystem.open_input_file(f"{path}/file")
    return in_words(uri, caught.value)


def test_a_wrong_bucket(client):
    assert read("s3://wrong/folder") == "there is no bucket s3://wrong. Correct the name, or make the bucket first"
    assert read(f"s3://{BUCKET}/nothing") == "No such file or directory"


def test_a_local_reason(tmp_path):
    assert read(tmp_path) == "No such file or directory"
    (tmp_path / "file").mkdir()
    filesystem, path = open_filesystem(tmp_path)
    with pytest.raises(OSError) as caught:
        filesystem.open_input_file(f"{path}/file").read()
    assert in_words(tmp_path, caught.value)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "ExpiredToken", "the credentials have expired. Sign in again. Check with: aws sts get-caller-identity"),
        (403, "InvalidAccessKeyId", "the credentials are missing or not valid. Check with: aws sts"),
        (403, "SignatureDoesNotMatch", "the credentials are missing or not valid. Check with: aws sts"),
        (
            403,
            "AccessDenied",
            "access is denied. Give this user .* the right to read and write s3://bucket. Check with",
        ),
        (301, "PermanentRedirect", "the bucket is in another region. Set AWS_DEFAULT_REGION"),
    ],
)
def test_what_the_storage_refuses(client, monkeypatch, status, code, message):
    with refusing(status, code, "The provided token has expired." if code == "ExpiredToken" else "") as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        words = read(f"s3://bucket/{code}")
    assert re.match(message, words), words


def test_no_network(client, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    filesystem, path = open_filesystem("s3://bucket/folder")
    with pytest.raises(OSError) as caught:
        filesystem.open_input_file(f"{path}/file")
    assert is_outage(caught.value)
    assert "cannot be reached" in in_words("s3://bucket/folder", caught.value)


def test_an_outage_is_waited_for(monkeypatch, caplog):
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds))
    waits, calls = [], []

    def action():
        calls.append(1)
        if len(calls) < 4:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")
        return "done"

    assert patiently(action, "Reading s3://bucket/file") == "done"
    assert waits == [1, 2, 4]
    assert "Reading s3://bucket/file: AWS Error NETWORK_CONNECTION" in caplog.text
    calls.clear()
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        patiently(action, "Reading", seconds=0)


@pytest.mark.parametrize("error", [FileNotFoundError("no"), OSError("AWS Error ACCESS_DENIED"), ValueError("other")])
def test_other_errors_are_not_waited_for(monkeypatch, error):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited"))

    def action():
        raise error

    with pytest.raises(type(error)):
        patiently(action, "Reading")


def test_a_service_that_says_what_it_must(client, monkeypatch):
    """moto's own check of the keys, which answers as S3 does."""
    import urllib.request

    def authenticate_after(count):
        url, headers = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, str(count).encode(), headers, method="POST")).close()

    authenticate_after(0)
    try:
        assert read(f"s3://{BUCKET}/x").startswith("the credentials are missing or not valid")
    finally:
        authenticate_after("inf")
