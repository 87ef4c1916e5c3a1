"""Output that appears at once or not at all, whatever happens: an error, Ctrl-C, a full disk, kill -9.

Files are written without a name (``O_TMPFILE``), so that the kernel removes them with the process that wrote
them, and get their name when they are complete. Where that is not possible, and for folders, something
hidden stands beside the destination while it is written; its writer holds a lock on it, and the next run
removes what nobody locks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from graphc.errors import BadInput

_SUFFIX = ".graphc~"
"""How the hidden name of unfinished output ends."""

MANIFEST = "graphc.json"
"""The file that makes a folder an artifact; under ``files`` it lists what else belongs to it, but the report."""

REPORT = "report.json"
"""The report in an artifact."""


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """Turn what the system says about writing into what a user can act on."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        hints = {
            errno.ENOENT: "create the folder first",
            errno.ENOTDIR: "create the folder first",
            errno.ENOSPC: "free some space, or choose another folder",
            errno.EDQUOT: "free some space, or choose another folder",
            errno.EFBIG: "the file system or a limit (ulimit -f) forbids files of this size",
        }
        hint = hints.get(error.errno, "choose a folder that you may write to")
        raise BadInput(
            "cannot write the output", where=str(destination), why=os.strerror(error.errno), hint=hint
        ) from error


class Temporary:
    """A file that is being written; ``place`` gives it its name.

    Attributes:
        file: Open for writing.
    """

    def __init__(self, folder: Path, base: str) -> None:
        self._hidden: Path | None = None
        try:
            descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
            if Path(f"/proc/self/fd/{descriptor}").exists():
                # It is locked before it may get a hidden name.
                with suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            else:
                os.close(descriptor)
                descriptor, self._hidden = _locked_file(folder, base)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            descriptor, self._hidden = _locked_file(folder, base)
        self._folder, self._base = folder, base
        self.file: BinaryIO = os.fdopen(descriptor, "w+b")

    def place(self, destination: Path) -> None:
        """Give the complete file its name, in place of what has it now."""
        self.file.flush()
        if self._hidden is None:
            if not os.path.lexists(destination):
                with suppress(FileExistsError):
                    self._link(destination)
                    return
            hidden = _hidden_name(self._folder, self._base)
            self._link(hidden)
            self._hidden = hidden
        self._hidden.replace(destination)
        self._hidden = None

    def _link(self, name: Path) -> None:
        # With a folder descriptor Python calls linkat(AT_SYMLINK_FOLLOW), which names an unnamed file.
        folder = os.open(self._folder, os.O_PATH)
        try:
            os.link(f"/proc/self/fd/{self.file.fileno()}", name, src_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let go of the file; without a name it is gone."""
        # What is still buffered need not be written, and may not be on a full disk.
        with suppress(OSError):
            self.file.close()
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)


@contextmanager
def temporary(destination: Path) -> Iterator[Temporary]:
    """A file to be written, in the folder of ``destination``, which is gone at the end unless it was placed.

    Raises:
        BadInput: The folder does not exist or cannot be written, or the disk is full.
    """
    with _explained(destination):
        _sweep(destination.parent)
        held = Temporary(destination.parent, destination.name)
        try:
            yield held
        finally:
            held.close()


def check_destination(destination: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse a destination that cannot be a file, or that is one of the inputs.

    Raises:
        BadInput: It is a folder, a device, in a folder that does not exist, or an input.
    """
    if not destination.parent.is_dir():
        raise BadInput(
            "cannot write the output",
            where=str(destination),
            why="the folder does not exist",
            hint="create it first",
        )
    if destination.is_dir():
        raise BadInput("the output is a folder", where=str(destination), hint="name a file in it")
    if destination.exists() and not destination.is_file():
        raise BadInput("the output is a device", where=str(destination), hint="name a file")
    for path in inputs:
        with suppress(OSError):
            if destination.samefile(path):
                raise BadInput(
                    "the output is the input",
                    where=str(destination),
                    why="inputs are never changed",
                    hint="choose another name with -o",
                )


@contextmanager
def file(destination: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name, complete, when the block ends without an error.

    Raises:
        BadInput: It cannot be written.
    """
    check_destination(destination)
    with temporary(destination) as held:
        yield held.file
        held.place(destination)


def write(destination: Path, content: str | bytes) -> None:
    """Write a whole file at once; text is UTF-8.

    Raises:
        BadInput: It cannot be written.
    """
    with file(destination) as out:
        out.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, so that only one process at a time renames and removes files in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Not every file system has locks; without them parallel writers of one output may disturb each other.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_artifact(folder: Path) -> bool:
    """Whether a folder was written by graphc."""
    return (folder / MANIFEST).is_file()


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """An empty folder on the file system of ``destination``, removed with all that is in it when the block ends.

    Raises:
        BadInput: It cannot be made.
    """
    destination = destination.absolute()
    with _explained(destination):
        _sweep(destination.parent)
        descriptor, hidden = _locked_folder(destination.parent, destination.name)
        try:
            # Writers lock the folder that they write to, hence not the one that is locked while it is in use.
            inner = hidden / destination.name
            inner.mkdir()
            yield inner
        except BadInput as error:
            if str(hidden) not in error.where:
                raise
            raise BadInput(error.what, where=str(destination), why=error.why, hint=error.hint) from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            os.close(descriptor)


@contextmanager
def folder(destination: Path) -> Iterator[Path]:
    """An empty folder that becomes ``destination`` when the block ends without an error, else is removed.

    An artifact that is there already is replaced at once.

    Raises:
        BadInput: As for ``check_folder``, or it cannot be written.
    """
    destination = destination.absolute()
    check_folder(destination)
    with staging(destination) as inner:
        yield inner
        with exclusive(destination.parent):
            check_folder(destination)
            if destination.exists():
                _exchange(inner, destination)
            else:
                inner.rename(destination)


def check_folder(destination: Path) -> None:
    """Refuse a destination that cannot become an artifact folder without losing what is there.

    Raises:
        BadInput: It is a file, a link, a folder with anything that graphc did not write, or its parent is missing.
    """
    destination = destination.absolute()
    if not destination.parent.is_dir():
        raise BadInput(
            "cannot write the output",
            where=str(destination),
            why="its parent folder does not exist",
            hint="create it first",
        )
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise BadInput("the output is a file or a link", where=str(destination), hint="name a folder")
    if not destination.exists():
        return
    foreign = sorted(p.name for p in destination.iterdir() if p.name not in _written(destination))
    if foreign:
        raise BadInput(
            "the output folder holds something else",
            where=str(destination),
            why=f"graphc did not write: {', '.join(foreign[:5])}",
            hint="choose an empty folder or one that graphc wrote",
        )


def _written(artifact: Path) -> set[str]:
    """The names of the files that the manifest of an artifact lists, and of the manifest and the report."""
    try:
        manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
        return {*manifest["files"], MANIFEST, REPORT}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _exchange(staged: Path, destination: Path) -> None:
    """Swap two folders at once where the system can, else rename one after the other."""
    exchange = 2  # RENAME_EXCHANGE, linux/fs.h
    here = -100  # AT_FDCWD, fcntl.h
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(here, os.fsencode(staged), here, os.fsencode(destination), exchange) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    descriptor, hidden = _locked_folder(destination.parent, destination.name)
    try:
        destination.rename(hidden / destination.name)
        staged.rename(destination)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(descriptor)


def _hidden_name(folder: Path, base: str) -> Path:
    return folder / f".{base[:32]}.{secrets.token_hex(4)}{_SUFFIX}"


def _locked_file(folder: Path, base: str) -> tuple[int, Path]:
    """A new hidden file and its descriptor, which holds its lock."""
    while True:
        path = _hidden_name(folder, base)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if _lock(descriptor, path):
            return descriptor, path


def _locked_folder(folder: Path, base: str) -> tuple[int, Path]:
    """A new hidden folder and a descriptor that holds its lock."""
    while True:
        path = _hidden_name(folder, base)
        path.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _lock(descriptor, path):
                return descriptor, path


def _lock(descriptor: int, path: Path) -> bool:
    """Lock what was just made; False if a sweep of another process took it for abandoned in between."""
    # Not every file system has locks.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
        return True
    os.close(descriptor)
    return False


def _sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder."""
    for path in folder.glob(f".*{_SUFFIX}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)
