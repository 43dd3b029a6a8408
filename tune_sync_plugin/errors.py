"""The package's errors, and the facts about any error that decide what happens next.

Whether an error is worth a retry is decided here and nowhere else, as is what of its text may be
shown: nothing that leaves this package may carry a credential.
"""

from __future__ import annotations

import errno
import re


class SyncError(Exception):
    """Base class of every error this package raises.

    Raised as itself at the end of an experiment when ``SyncConfig(strict=True)`` and something
    could not be synced; the message names it.
    """


class SourceError(SyncError):
    """A local file could not be read. Never a reason to retry within the same sync."""


class SourceChangedError(SourceError):
    """A local file shrank or vanished while it was read; the next sync takes it."""


# An errno that no amount of waiting changes.
_FATAL_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENOTSUP,
}

_FATAL_STATUSES = {400, 401, 403, 404, 405, 501}

# pyarrow and the S3 clients raise bare OSErrors whose text is all there is to go by. The text also
# holds the object's key, so each alternative is a phrase that clients write around such a code.
_FATAL_TEXT = re.compile(
    r"AWS Error (?:ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH"
    r"|MISSING_AUTHENTICATION_TOKEN|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT"
    r"|EXPIRED_TOKEN|INVALID_SIGNATURE|VALIDATION)\b"
    r"|HTTP status (?:400|401|403|404|405|501)\b"
    r"|HTTP response code: (?:400|401|403|404|405|501)\b"
    r"|\((?:AccessDenied|NoSuchBucket|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken)\)"
    r"|Unable to locate credentials|NoCredentialsError"
    # s3fs and gcsfs make a bare FileNotFoundError of it.
    r"|The specified bucket does not exist"
    # Azure's.
    r"|ErrorCode:(?:Authentication|Authorization|InsufficientAccount|NoAuthentication)\w+"
    r"|ErrorCode:(?:Container(?:NotFound|BeingDeleted|Disabled)|AccountIsDisabled|InvalidUri)\b"
    # Google's, as gcsfs has them.
    r"|does not have storage\.\w+\.\w+ access|^Forbidden: |Invalid Credentials, 401",
    re.IGNORECASE,
)


# Of ours or of a client's, which the next try has as well; or a library is missing.
_BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError, ImportError)


def is_retryable(error: BaseException) -> bool:
    """Whether trying the same operation again, a little later, can succeed.

    Unknown errors count as retryable: a needless retry costs seconds, a missing one loses a file.
    """
    if isinstance(error, SourceError | PermissionError | NotImplementedError | ValueError):
        return False
    if isinstance(error, _BUGS):
        return False
    if isinstance(error, OSError) and error.errno in _FATAL_ERRNOS:
        return False
    # Azure's client notes the HTTP status; fsspec's makes a RuntimeError of what that raises.
    statuses = {getattr(each, "status_code", None) for each in (error, error.__cause__)}
    return not statuses & _FATAL_STATUSES and not _FATAL_TEXT.search(_text(error))


def _text(error: BaseException) -> str:
    # s3fs makes Python's errors of S3's messages; the operation and the code stay in the cause.
    said = getattr(error, "strerror", None) or str(error)
    cause = str(error.__cause__ or "")
    return cause if said in cause else str(error)


# Where the clients write S3's error code or the HTTP status, and where Python an errno.
_CODE = re.compile(
    r"AWS Error (?:UNKNOWN \(HTTP status )?(\w+)|An error occurred \((\w+)\) when calling"
    r"|HTTP (?:status|response code:) (\d{3})\b|\[(Errno \d+)\]|\bErrorCode:(\w+)"
)


def code_of(message: str) -> str | None:
    """What tells causes apart that clients raise as one class: 403 and 500 are both ``OSError``s.

    Example:
        >>> code_of("upload of b/k failed: AWS Error ACCESS_DENIED during UploadPart operation")
        'ACCESS_DENIED'
    """
    found = _CODE.search(message)
    return next(filter(None, found.groups())) if found else None


_DENIED_TEXT = re.compile(r"AWS Error ACCESS_DENIED\b|HTTP (?:status|response code:) 403\b")


def is_denied(error: BaseException) -> bool:
    """Whether the credentials don't allow it; pyarrow has no error of its own for that."""
    return isinstance(error, PermissionError) or bool(_DENIED_TEXT.search(str(error)))


# Userinfo up to the last @, and the parameters of signed URLs, headers and connection strings.
_SECRETS = re.compile(
    r"(://)[^/\s]+(?=@)"
    r"|(\b(?:Signature|Credential|Security-Token|AccountKey)=|[?&]sig=)[^&;\s]+",
    re.IGNORECASE,
)


# What Azure's client says a second time, as XML, and what only Microsoft can look up.
_NOISE = re.compile(r" (?:RequestId:\S+ Time:\S+|Content: <\?xml.*)")


def redact(text: str) -> str:
    """A text with the credentials in its URLs blanked out."""
    return _SECRETS.sub(r"\1\2***", text)


def describe(error: BaseException) -> str:
    """One line about an error, with credentials in URLs blanked out."""
    text = _NOISE.sub("", " ".join(_text(error).split())) or type(error).__name__
    return redact(text)[:500]
