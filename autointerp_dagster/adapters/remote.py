"""Stores that are no folder of this machine: opening them, and their failures in words.

Other machines write to them at any time, so no listing is ever kept. The libraries behind them
raise errors of their own kinds, which are known by type and code alone: what they say may hold
signed addresses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from autointerp_dagster.core.errors import StoreError

_LOCAL = frozenset({"", "file", "local"})
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Which extra of this package brings what opens a URL."""
_NO_ANSWER = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "ConnectionClosed", "Endpoint")
_NO_CREDENTIALS = ("Credential", "TokenRetrieval", "SSO", "ProfileNotFound")
_REMEDY_ADDRESS = (
    "the store does not answer. Check the network and the address (for S3 that is no Amazon's: "
    "AWS_ENDPOINT_URL); what is done is kept"
)
_REMEDY_CREDENTIALS = (
    "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
    "or what else your store wants"
)
_REMEDY_ACCESS = (
    "access denied. Check the credentials and that they may list, read, write and delete there"
)


def is_local(root: UPath) -> bool:
    """Whether ``root`` is a folder of this machine."""
    return root.protocol in _LOCAL


def open_root(root: str | Path | UPath) -> UPath:
    """The root of a store; nothing is read yet.

    Raises:
        StoreError: If what opens such a URL is not installed, or there is none.
    """
    try:
        path = UPath(root)
        path = path if is_local(path) else UPath(path, use_listings_cache=False)
        _ = path.fs  # made now, from what is installed
    except (ImportError, ValueError) as error:
        protocol = str(root).partition("://")[0]
        extra = _EXTRAS.get(protocol)
        what = f"pip install 'autointerp_dagster[{extra}]'" if extra else "Use s3:// or gs://"
        raise StoreError(f"store {root}: {protocol}:// cannot be opened here. {what}.") from error
    return path


@contextmanager
def store_errors(path: UPath) -> Iterator[None]:
    """Work on a store, whose failures are OSErrors whatever library speaks to it.

    Raises:
        FileNotFoundError: If a file is not there.
        OSError: If the store failed; says why and what to do.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if is_local(path):
            raise
        said = _said(path, error)
        if said is None:
            raise
        raise OSError(said) from error


def _said(path: UPath, error: Exception) -> str | None:
    """What failed and what to do; null if the error says so itself."""
    kind = type(error).__name__
    if _code(error) == "NoSuchBucket":
        bucket = path.path.lstrip("/").partition("/")[0]
        return f"there is no bucket {bucket!r}. Make it, or correct the study's `store`"
    if isinstance(error, PermissionError):
        return f"{_REMEDY_ACCESS} ({_code(error) or kind})"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return None
    if any(name in kind for name in _NO_CREDENTIALS):
        return f"{_REMEDY_CREDENTIALS} ({kind})"
    if isinstance(error, OSError) or any(name in kind for name in _NO_ANSWER):
        return f"{_REMEDY_ADDRESS} ({kind})"
    return f"the store failed with {kind}"


def _code(error: BaseException) -> str:
    """What an S3 server called a failure; empty if no such server did."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        seen = seen.__cause__ or seen.__context__
    return ""
