"""Why a file cannot be read, in words that say how to go on."""

from __future__ import annotations

import errno

_MENDS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.ENAMETOOLONG: "check the path",
    errno.ELOOP: "its links lead in a circle, name the file itself",
    errno.EISDIR: "give the path of a file in it",
    errno.EACCES: "allow it, as its owner with chmod u+r",
    errno.EPERM: "allow it, as its owner with chmod u+r",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
    errno.ENFILE: "close other programs, the system has too many files open",
    errno.EIO: "the disk failed, try again or copy the file to another one",
    errno.ESTALE: "the network disk was lost, try again",
}
# Of the system, or mended without a change of the file: another time it may be read.
_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO),
    *(errno.ECONNABORTED, errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EBUSY),
    *(errno.EINTR, errno.EACCES, errno.EPERM),
)


def why(error: Exception) -> str:
    """What an error while a file was opened or read says, with the mend where there is one."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is; make it smaller"
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    said = error.strerror or str(error)
    mend = _MENDS.get(error.errno)
    return said if mend is None else f"{said}; {mend}"


def may_pass(error: BaseException) -> bool:
    """Whether the system failed, or what caused the error did, and not the file: another time it may be read."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return True
        # Pillow raises OSError for damage, without a number
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno in _PASSING
        cause = cause.__cause__
    return False
