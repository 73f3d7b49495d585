"""Reads `s3://` through fsspec, whose S3 is s3fs (the extra `s3`). Imports no torch.

Who reads, and where, is said by the environment as AWS's own tools take it: `AWS_PROFILE`, `AWS_ACCESS_KEY_ID` and
`AWS_SECRET_ACCESS_KEY` (or a role of the machine), `AWS_DEFAULT_REGION`, `AWS_ENDPOINT_URL` for a server that is not
AWS's; and fsspec's `FSSPEC_S3_*`, such as `FSSPEC_S3_ANON=true` for a public bucket. Nothing of it is written down.

Each call makes a file system, a session and an event loop of its own and leaves none behind: fsspec's shared ones, and
the thread that serves them, do not survive the fork of a loader's workers.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from s3fs import S3FileSystem

_Result = TypeVar("_Result")

_VERSION = "?versionId="
_ACCESS = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket, "
    "and AWS_ENDPOINT_URL for a server that is not AWS's"
)
_PASSING_STATUS = frozenset({408, 425, 429})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"})
"""What of a server's refusals (4xx) another attempt may mend."""


def fetch_object(url: str, target: Path) -> None:
    """Write an object's bytes to a file, in one request: who calls tries again, so that s3fs and botocore do not.

    Raises:
        UserError: no further attempt can succeed, as where the object or the credentials are missing.
        OSError: another attempt may; or the file cannot be written.
    """

    async def fetch(filesystem: "S3FileSystem") -> None:
        filesystem.retries = 1
        filesystem.config_kwargs = {**filesystem.config_kwargs, "retries": {"total_max_attempts": 1}}
        # One stream is one version of the object; parts that are fetched side by side need not be.
        await filesystem._get_file(_path(url), str(target), max_concurrency=1)

    asyncio.run(_use(url, fetch, version_aware=_VERSION in url))


def list_tars(url: str) -> list[str]:
    """The URLs of all `*.tar` of a directory, that is of a URL that ends in a slash, sorted.

    Raises:
        UserError: there is none, or the directory cannot be listed.
    """

    async def list_names(filesystem: "S3FileSystem") -> list[str]:
        try:
            found = await filesystem._ls(_path(url).rstrip("/"), detail=True)
        except FileNotFoundError as error:
            if error.__cause__ is None:  # s3fs's own: the bucket is there, and empty at this place
                return []
            raise
        return [each["name"] for each in found if each["type"] == "file" and each["name"].endswith(".tar")]

    try:
        names = asyncio.run(_use(url, list_names))
    except OSError as error:
        raise UserError(f"data.shards: {url} cannot be listed ({error}); check the URL and the network") from error
    if not names:
        raise UserError(f"data.shards: {url} holds no *.tar; give the directory that holds the shards")
    return sorted(f"s3://{name}" for name in names)


def _path(url: str) -> str:
    """Bucket and key."""
    return url.split("://", 1)[1]


async def _use(url: str, work: Callable[["S3FileSystem"], Awaitable[_Result]], **options: Any) -> _Result:
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise UserError(f"data.shards: {url} needs s3fs ({error}); install it with `pip install -e '.[s3]'`") from error
    try:
        filesystem = S3FileSystem(asynchronous=True, skip_instance_cache=True, **options)
        try:
            return await work(filesystem)
        finally:
            if filesystem._s3 is not None:
                await filesystem._s3.close()
    except Exception as error:  # botocore, aiobotocore, aiohttp and s3fs have no common one
        explained = _explain(url, error)
        if explained is None:
            raise
        raise explained from error


def _explain(url: str, error: Exception) -> Exception | None:
    """What to raise for an error of s3fs: OSError where another attempt may succeed, UserError else; None: as it is."""
    from aiohttp import ClientError as TransferError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    for each in (error, error.__cause__):  # s3fs makes errors of Python of what the server answered
        if isinstance(each, boto.ClientError):
            return _explain_answer(url, each)
    if isinstance(error, OSError):
        return None
    passing = (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.CredentialRetrievalError,
        boto.MetadataRetrievalError,
        boto.IncompleteReadError,
        boto.ChecksumError,
        boto.FlexibleChecksumError,
        ResponseParserError,
        TransferError,
        TimeoutError,
    )
    if isinstance(error, passing):
        return OSError(_one_line(error))
    return UserError(f"data.shards: {url} cannot be read ({_one_line(error)}); {_ACCESS}")


def _explain_answer(url: str, error: "ClientError") -> Exception:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    answer = error.response.get("Error", {})
    code, message = str(answer.get("Code", "")), str(answer.get("Message", ""))
    cause = " ".join(f"{code}: {message}".split())
    if status is None or status >= 500 or status in _PASSING_STATUS or code in _PASSING_CODES:
        return OSError(cause)
    if status == 404:
        return UserError(f"data.shards: {url} does not exist ({cause}); give shards that the bucket has")
    if status in (401, 403):
        # Who may not list a bucket is told so of what is not in it too.
        absent = " or does not exist" if code in ("AccessDenied", "403") else ""
        return UserError(f"data.shards: {url} may not be read{absent} ({cause}); {_ACCESS}")
    return UserError(f"data.shards: {url} cannot be read ({cause}); check the URL, AWS_DEFAULT_REGION and credentials")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
