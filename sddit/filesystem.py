"""One way to open storage: a local path, pyarrow's own schemes (s3, gs, hdfs, file), any other through fsspec.

What goes wrong there (no such bucket, no right, expired credentials, no network) is said in one sentence with what to
do, and an outage is waited for. Credentials come from where the libraries look for them, never from the project.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyarrow import ArrowException, fs

from sddit.errors import SdditError, StorageError, UsageError, did_you_mean, without_password

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE_SECONDS = float(os.environ.get("SDDIT_PATIENCE_SECONDS", "600"))  # how long an outage is waited for
_GCS_RETRY_SECONDS = 10  # pyarrow alone would retry a refused request for a quarter of an hour

_WHO = {  # by scheme, how to see who one is
    "s3": ". Check with: aws sts get-caller-identity",
    "gs": ". Sign in with: gcloud auth application-default login",
    "gcs": ". Sign in with: gcloud auth application-default login",
}


class _Trouble(NamedTuple):
    pattern: str  # searched in the libraries' words, whatever the case
    words: str  # a sentence; {root} is the bucket, {who} how to see who one is
    passes: bool = False  # whether waiting may help


# The first that fits wins. The libraries have no common exceptions, but their words are those of the services.
_TROUBLES = (
    _Trouble(
        r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found|bucket does not exist",
        "there is no bucket {root}. Correct the name, or make the bucket first",
    ),
    _Trouble(
        r"Expired ?Token|EXPIRED_TOKEN|token.{0,40}expired|RequestExpired|REQUEST_EXPIRED|invalid_grant",
        "the credentials have expired. Sign in again{who}",
    ),
    _Trouble(
        r"INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch|InvalidToken|"
        r"INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE|UNRECOGNIZED_CLIENT|UNAUTHENTICATED|NoCredentials|"
        r"MISSING_AUTHENTICATION_TOKEN|Unable to locate credentials|HTTP status 401|\b401\b",
        "the credentials are missing or not valid{who}",
    ),
    _Trouble(
        r"REQUEST_TIME_TOO_SKEWED|RequestTimeTooSkewed",
        "this machine's clock is wrong, so its requests are refused. Set the clock (NTP)",
    ),
    _Trouble(
        r"ACCESS_DENIED|AccessDenied|PERMISSION_DENIED|Permission denied|Forbidden|HTTP status 403|\b403\b",
        "access is denied. Give this user or this node's role the right to read and write {root}{who}",
    ),
    _Trouble(
        r"PermanentRedirect|HTTP status 301|AuthorizationHeaderMalformed",
        "the bucket is in another region. Set AWS_DEFAULT_REGION to the bucket's",
    ),
    _Trouble(
        r"NETWORK_CONNECTION|curlCode|Could not connect|resolve host|Connection (refused|reset|aborted)|timed? ?out|"
        r"TIMEOUT|Name or service not known|Temporary failure|unreachable|UNAVAILABLE|DEADLINE_EXCEEDED|"
        r"HTTP status 5\d\d|SLOW_DOWN|SlowDown|ServiceUnavailable|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|InternalError|"
        r"THROTTLING|RequestTimeout|REQUEST_TIMEOUT",
        "the storage cannot be reached, or is overloaded. Check the network, the name of the host and, if you set it, "
        "AWS_ENDPOINT_URL; then run again",
        passes=True,
    ),
)


def is_remote(uri: str | Path) -> bool:
    """Whether `uri` is an address (``s3://…``) that does not name this machine's own files."""
    scheme, found, _ = str(uri).partition("://")
    return bool(found) and scheme.lower() not in ("file", "local")


def open_filesystem(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The file system that `uri` is on, and the path within it, without a slash at its end.

    Args:
        uri: a local path (``~`` is the home folder), or an address: ``s3://bucket/path``, ``gs://bucket/path``,
            ``hdfs://…``, ``file:///…``, or of any scheme that fsspec knows and whose package is installed.

    Raises:
        UsageError: an unknown scheme or a malformed address.
        StorageError: no such bucket, no access, no network, or a package is missing.
    """
    uri = str(uri)
    scheme, found, rest = uri.partition("://")
    if not found:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    if not rest.strip("/"):
        raise UsageError(f"{uri!r} names no place. Give a bucket and a folder, as in s3://bucket/folder.")
    try:
        if scheme in ("gs", "gcs") and "?" not in uri:
            uri = f"{uri}?retry_limit_seconds={_GCS_RETRY_SECONDS}"
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path.rstrip("/") or "/"
    except OSError as error:
        raise StorageError(f"Cannot open {uri}: {in_words(uri, error)}.") from error
    except ArrowException as error:
        if "Unrecognized filesystem type" not in str(error):
            raise UsageError(f"{uri!r} is not an address: {error}. Give one as in s3://bucket/folder.") from None
    return _through_fsspec(scheme, uri)


def _through_fsspec(scheme: str, uri: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    known = sorted({*fsspec.available_protocols(), "s3", "gs", "hdfs", "file"})
    if scheme not in known:
        raise UsageError(f"Unknown scheme {scheme!r} in {uri!r}. {did_you_mean(scheme, known)}")
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:  # fsspec says which package
        raise StorageError(f"Cannot open {uri}: {str(error).rstrip('.')}. Install it on every node.") from None
    except Exception as error:  # each of the many implementations raises what it likes
        raise StorageError(f"Cannot open {uri}: {in_words(uri, error)}.") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path.rstrip("/") or "/"


def in_words(uri: str | Path, error: BaseException) -> str:
    """What `error` at `uri` means and what to do, as the rest of a sentence without its full stop.

    An answer to a request for one file carries no body, so a missing bucket looks like a missing file and expired
    credentials like a bad request: such a one is asked again in a way that is answered in words.
    """
    text = str(error)
    trouble = _trouble(text)
    vague = isinstance(error, FileNotFoundError) or "No response body" in text or "HTTP status 400" in text
    if is_remote(uri) and vague and (clearer := _trouble(_listing_error(str(uri)))):
        trouble = clearer
    if trouble is None:
        number = getattr(error, "errno", None)
        return os.strerror(number) if number else _one_line(error)
    scheme, _, rest = str(uri).partition("://")
    root = f"{scheme}://{rest.partition('/')[0]}" if rest else str(uri)
    return trouble.words.format(root=root, who=_WHO.get(scheme, ""))


def is_outage(error: BaseException) -> bool:
    """Whether `error` may pass by itself: no network, or a storage that is overloaded or down."""
    if isinstance(error, SdditError):
        return error.__cause__ is not None and is_outage(error.__cause__)
    trouble = _trouble(str(error))
    return isinstance(error, (TimeoutError, ConnectionError)) or bool(trouble and trouble.passes)


def patiently(
    action: Callable[[], T],
    what: str,
    *,
    seconds: float | None = None,
    passes: Callable[[Exception], bool] = is_outage,
) -> T:
    """The result of `action`, tried again for up to `seconds` (None: `PATIENCE_SECONDS`) while an outage lasts. Other
    errors are raised.

    `what` names it in the log, as in 'Reading s3://bucket/file'. The waits are 1, 2, 4 … at most 30 s. `passes` says
    whether an error may pass by itself.
    """
    seconds = PATIENCE_SECONDS if seconds is None else seconds
    begun, wait = time.monotonic(), 1.0
    while True:
        try:
            return action()
        except Exception as error:
            left = seconds - (time.monotonic() - begun)
            if not passes(error) or left <= 0:
                raise
            text = without_password(f"{what}: {_one_line(error)}")
            log.warning("%s; trying again for %.0f s more.", text, left)
            time.sleep(min(wait, left, 30.0))
            wait *= 2


def _trouble(text: str) -> _Trouble | None:
    return next((trouble for trouble in _TROUBLES if re.search(trouble.pattern, text, re.IGNORECASE)), None)


def _listing_error(uri: str) -> str:
    """What the storage says when the folder of `uri` is listed; empty where it does not complain."""
    try:
        filesystem, path = open_filesystem(uri)
        filesystem.get_file_info(fs.FileSelector(path))  # an answer with a body
    except (OSError, ArrowException, StorageError) as error:
        return str(error)
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
