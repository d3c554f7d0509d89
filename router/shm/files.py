"""Files that processes of one router replica map together: where they lie, how they are made, how a bad one is found.

A mapped file begins with one page of header: magic, layout version and what it was made for. Whoever attaches checks
all of it, so that processes of two releases, or of two replicas, never read one another's memory by accident.
"""

import errno
import fcntl
import mmap
import os
import re
import stat
from pathlib import Path

import xxhash

PAGE_BYTES = 4096
SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux."""

_REPLICA_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")


class SharedMemoryError(Exception):
    """The shared files are missing, made for something else, in use, or there is no room for them."""


class ReplicaInUseError(SharedMemoryError):
    """A running replica holds the directory."""


def check_replica_id(replica_id: str) -> str:
    """The id itself. Raises SharedMemoryError unless it matches ``[A-Za-z0-9._-]{1,128}`` and is no dot name."""
    if not _REPLICA_ID.match(replica_id) or replica_id in (".", ".."):
        raise SharedMemoryError(f"replica id {replica_id!r} must match [A-Za-z0-9._-]{{1,128}}")
    return replica_id


def shared_directory(run_dir: str, replica_id: str, base: str = "/dev/shm") -> Path:
    """Where the shared files of a replica lie: ``<base>/twofold-<uid>-<hash of the run dir>-<replica>``.

    Long replica ids are shortened by a hash, because a Unix socket lies in the directory too.
    """
    check_replica_id(replica_id)
    name = replica_id if len(replica_id) <= 40 else f"{replica_id[:23]}-{xxhash.xxh3_64_hexdigest(replica_id.encode())}"
    run = xxhash.xxh3_64_hexdigest(os.fsencode(os.path.realpath(run_dir)))[:12]
    return Path(base) / f"twofold-{os.getuid()}-{run}-{name}"


def make_private_directory(directory: Path) -> None:
    """Create ``directory`` with mode 0700, or accept one that is ours and private. Raises SharedMemoryError."""
    try:
        directory.mkdir(mode=0o700, parents=False)
    except FileExistsError:
        pass
    except OSError as error:
        raise SharedMemoryError(f"cannot create {directory}: {error.strerror}") from None
    check_private_directory(directory)


def check_private_directory(directory: Path) -> None:
    """Raises SharedMemoryError unless ``directory`` is a real directory of this user that nobody else can enter."""
    try:
        info = directory.lstat()
    except OSError as error:
        raise SharedMemoryError(f"cannot use {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise SharedMemoryError(f"{directory} is not a directory")
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise SharedMemoryError(f"{directory} belongs to another user or is open to others")


class DirectoryLock:
    """An exclusive lock that says "this replica runs"; the kernel drops it when its holder dies."""

    def __init__(self, directory: Path) -> None:
        """Take the lock. Raises SharedMemoryError when another process holds it."""
        self.path = directory / "lock"
        while True:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._fd)
                raise ReplicaInUseError(f"{directory} is in use by a running replica") from None
            if self._is_current():
                return
            os.close(self._fd)  # its last holder removed the file between our open and our lock

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the file and drop the lock. Idempotent."""
        if self._fd < 0:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


def create_mapped(path: Path, size_bytes: int) -> mmap.mmap:
    """A new zeroed file of ``size_bytes``, mapped writable. Its pages are allocated now, so that a full file system
    is an error here and no SIGBUS later. Raises SharedMemoryError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise SharedMemoryError(f"cannot create {path}: {error.strerror}") from None
    try:
        _allocate(fd, size_bytes)
        return mmap.mmap(fd, size_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise SharedMemoryError(f"cannot allocate {size_bytes} bytes for {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def _allocate(fd: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size_bytes)


def open_mapped(path: Path, *, writable: bool) -> mmap.mmap:
    """An existing file, mapped whole. Raises SharedMemoryError when it is missing or shorter than a header."""
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SharedMemoryError(f"cannot open {path}: {error.strerror}") from None
    try:
        size_bytes = os.fstat(fd).st_size
        if size_bytes < PAGE_BYTES:
            raise SharedMemoryError(f"{path} is too short: {size_bytes} bytes")
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        return mmap.mmap(fd, size_bytes, prot=protection)
    finally:
        os.close(fd)


def round_up_to_page(size_bytes: int) -> int:
    """Smallest multiple of a page that holds ``size_bytes``."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def close_quietly(mapping: mmap.mmap) -> None:
    """Close a mapping; when memoryviews of it are still alive, the last of them frees it."""
    try:
        mapping.close()
    except BufferError:
        pass
