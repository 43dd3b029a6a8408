"""Which errors are worth a retry, and which parts of them may be shown."""

from __future__ import annotations

import errno
import pickle

import pytest

from tune_sync_plugin.errors import (
    SourceChangedError,
    SourceError,
    SyncError,
    code_of,
    describe,
    is_retryable,
)


def os_error(number: int) -> OSError:
    return OSError(number, "as scripted")


def as_s3fs(translated: Exception, code: str, operation: str = "PutObject") -> Exception:
    """What s3fs makes of S3's error, whose message is "no"."""
    about = f"An error occurred ({code}) when calling the {operation} operation: no"
    translated.__cause__ = RuntimeError(about)
    return translated


RETRYABLE = [
    as_s3fs(OSError(errno.EREMOTEIO, "no"), "InternalError"),
    as_s3fs(FileNotFoundError("no"), "NoSuchUpload", "UploadPart"),
    os_error(errno.EIO),
    os_error(errno.ECONNRESET),
    os_error(errno.ECONNREFUSED),
    os_error(errno.EPIPE),
    os_error(errno.ETIMEDOUT),
    os_error(errno.EHOSTUNREACH),
    os_error(errno.ENETUNREACH),
    os_error(errno.EBUSY),  # what s3fs makes of 503 SlowDown
    os_error(errno.EREMOTEIO),  # and of 500
    os_error(errno.ESTALE),
    os_error(errno.EAGAIN),
    os_error(errno.EMFILE),
    OSError("no errno at all"),
    ConnectionResetError("peer"),
    TimeoutError("slow"),
    EOFError("the connection was closed"),
    RuntimeError("something that nobody knows"),
    OSError(
        "When uploading part for key 'x' in bucket 'b': AWS Error SLOW_DOWN during UploadPart "
        "operation: Please reduce your request rate."
    ),
    OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation: No response body."),
    OSError("AWS Error UNKNOWN (HTTP status 500) during PutObject operation: No response body."),
    OSError("AWS Error INTERNAL_FAILURE during CompleteMultipartUpload operation: try again"),
    OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7"),
    OSError("AWS Error REQUEST_TIMEOUT during PutObject operation"),
    # Names of files that look like codes.
    OSError("When uploading key 'runs/403/HTTP status/AccessDenied.txt': AWS Error SLOW_DOWN"),
    RuntimeError("The server is busy.\nErrorCode:ServerBusy"),
    RuntimeError("Operation could not be completed in time.\nErrorCode:OperationTimedOut"),
    OSError("WebDAV request of a: HTTP status 503 (received 503 (Service Unavailable))"),
    OSError("upload of NoSuchBucket/404 failed: Connection reset by peer"),
]

FATAL = [
    as_s3fs(FileNotFoundError("no"), "NoSuchBucket"),
    SourceError("can't be read"),
    SourceChangedError("shrank"),
    PermissionError("Access Denied"),  # what s3fs makes of 403
    PermissionError(errno.EACCES, "Permission denied"),
    NotImplementedError("write"),
    ValueError("not a valid name"),
    os_error(errno.EACCES),
    os_error(errno.EPERM),
    os_error(errno.EROFS),
    os_error(errno.ENOSPC),
    os_error(errno.EDQUOT),
    os_error(errno.ENAMETOOLONG),
    os_error(errno.EEXIST),
    os_error(errno.EISDIR),
    os_error(errno.ENOTDIR),
    os_error(errno.EINVAL),
    os_error(errno.EILSEQ),
    os_error(errno.ENOTSUP),
    FileNotFoundError("The specified bucket does not exist"),  # s3fs and gcsfs: no such bucket
    OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied."),
    OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: it does not exist"),
    OSError("AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: no such key id"),
    OSError("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: check your key"),
    OSError("AWS Error EXPIRED_TOKEN during PutObject operation: it has expired"),
    OSError("AWS Error UNKNOWN (HTTP status 403) during PutObject operation: No response body."),
    OSError("AWS Error UNKNOWN (HTTP status 400) during CreateMultipartUpload operation"),
    OSError("AWS Error UNKNOWN (HTTP status 501) during PutObject operation"),
    OSError("PutObject failed, HTTP response code: 403"),
    RuntimeError("An error occurred (AccessDenied) when calling the PutObject operation"),
    RuntimeError("An error occurred (NoSuchBucket) when calling the PutObject operation"),
    RuntimeError("An error occurred (ExpiredToken) when calling the PutObject operation"),
    RuntimeError("Unable to locate credentials"),
    ImportError("az:// needs a library that is missing here"),
    RuntimeError("Server failed to authenticate the request.\nErrorCode:AuthenticationFailed"),
    RuntimeError("Failed to upload block: no\nErrorCode:AuthorizationPermissionMismatch\n!"),
    RuntimeError("The specified container does not exist.\nErrorCode:ContainerNotFound"),
    OSError("Forbidden: https://storage.googleapis.com/upload/storage/v1/b/bucket/o\nno"),
    RuntimeError("a@b does not have storage.objects.create access to the object, 401"),
    OSError("WebDAV request of a: HTTP status 401 (received 401 (Unauthorized))"),
]


@pytest.mark.parametrize("error", RETRYABLE, ids=str)
def test_worth_a_retry(error: Exception) -> None:
    assert is_retryable(error)


@pytest.mark.parametrize("error", FATAL, ids=str)
def test_not_worth_a_retry(error: Exception) -> None:
    assert not is_retryable(error)


class TestDescribe:
    @pytest.mark.parametrize(
        "text",
        [
            "GET https://user:SECRET@host/path failed",
            "GET https://SECRET@host/path failed",
            "GET https://user:pa@SECRET@host/path failed",
            "can't open sftp://me:SECRET@box:22/x or http://me:SECRET@other/",
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=SECRET&X-Amz-Expires=60",
            "https://b.s3.amazonaws.com/k?X-Amz-Expires=60&X-Amz-Signature=SECRET",
            "https://b.s3.amazonaws.com/k?X-Amz-Credential=SECRET%2F20260101&X-Amz-Date=1",
            "https://b.s3.amazonaws.com/k?x-amz-security-token=SECRET",
            "https://acct.blob.core.windows.net/c/b?sv=2020&sig=SECRET%3D",
            "https://acct.blob.core.windows.net/c/b?sig=SECRET&sv=2020",
            "https://storage.googleapis.com/b/o?X-Goog-Signature=SECRET&X-Goog-Credential=SECRET",
            "https://b.s3.amazonaws.com/k?AWSAccessKeyId=x&Signature=SECRET&Expires=1",
            "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=SECRET==;EndpointSuffix=x",
        ],
    )
    def test_blanks_secrets_and_nothing_else(self, text: str) -> None:
        described = describe(OSError(text))
        assert "SECRET" not in described
        assert "***" in described

    def test_keeps_what_helps(self) -> None:
        text = "GET https://user:SECRET@host:9000/bucket/key?X-Amz-Signature=SECRET&partNumber=3"
        described = describe(OSError(text))
        assert "host:9000/bucket/key" in described
        assert "partNumber=3" in described

    @pytest.mark.parametrize(
        "text",
        [
            "upload of s3://bucket/key@2x.png failed: 403",
            "no such file: results/me@home.txt",
            "https://host/a/b: mail admin@example.org",
        ],
    )
    def test_leaves_the_rest_alone(self, text: str) -> None:
        assert describe(OSError(text)) == text

    @pytest.mark.parametrize("error", [PermissionError("no"), OSError(errno.EIO, "no")], ids=str)
    def test_says_the_operation_and_the_code_that_s3fs_leaves_in_the_cause(
        self, error: Exception
    ) -> None:
        described = describe(as_s3fs(error, "AccessDenied", "UploadPart"))
        assert "AccessDenied" in described
        assert "UploadPart" in described
        error.__cause__ = RuntimeError("something else")
        assert describe(error) == str(error)

    def test_leaves_out_what_azure_says_twice(self) -> None:
        text = "no such container\nRequestId:1-2\nTime:2026\nErrorCode:ContainerNotFound\nContent: "
        described = describe(OSError(f"{text}<?xml version='1.0'?><Error>no</Error>"))
        assert described == "no such container ErrorCode:ContainerNotFound"

    def test_is_one_line_of_bounded_length(self) -> None:
        assert describe(OSError("a\n  b\tc")) == "a b c"
        assert len(describe(OSError("x" * 10_000))) == 500

    def test_cuts_no_secret_in_half(self) -> None:
        text = "x" * 480 + " https://user:SECRETSECRETSECRET@host/"
        assert "SECRET" not in describe(OSError(text))

    def test_says_at_least_the_error_s_name(self) -> None:
        assert describe(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("k: AWS Error ACCESS_DENIED during UploadPart operation: no", "ACCESS_DENIED"),
        ("k: AWS Error UNKNOWN (HTTP status 403) during PutObject operation", "403"),
        ("An error occurred (NoSuchBucket) when calling the PutObject operation", "NoSuchBucket"),
        ("PutObject failed, HTTP response code: 403", "403"),
        ("[Errno 28] No space left on device", "Errno 28"),
        ("upload of 403/AccessDenied failed: peer", None),
    ],
)
def test_the_code_tells_causes_apart(message: str, code: str | None) -> None:
    assert code_of(message) == code


def test_the_hierarchy() -> None:
    assert issubclass(SourceError, SyncError)
    assert issubclass(SourceChangedError, SourceError)
    error = pickle.loads(pickle.dumps(SourceChangedError("shrank")))
    assert (type(error), str(error)) == (SourceChangedError, "shrank")
