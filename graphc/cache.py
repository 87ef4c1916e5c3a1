"""One content-addressed store for everything that is expensive to make again.

An entry is a folder under ``GRAPHC_CACHE_DIR`` (``~/.cache/graphc`` if unset). It is filled beside its place
and renamed into it, so that parallel builds see whole entries only; whoever comes second keeps the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT = 4 << 30
"""Bytes that the store may hold (``GRAPHC_CACHE_LIMIT`` overrides it); the entries unused longest go first."""


def key(**parts: Any) -> str:
    """The name of an entry: a SHA-256 over JSON-able parts, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """The store in one folder.

    Args:
        folder: Where; by default ``GRAPHC_CACHE_DIR`` or ``~/.cache/graphc``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        default = os.environ.get("GRAPHC_CACHE_DIR") or Path.home() / ".cache" / "graphc"
        self.folder = folder or Path(default)
        self.limit = int(os.environ.get("GRAPHC_CACHE_LIMIT") or LIMIT)

    def get(self, name: str) -> Path | None:
        """The folder of an entry, or None; it counts as used now."""
        entry = self.folder / name[:2] / name
        if not entry.is_dir():
            return None
        with suppress(OSError):
            os.utime(entry)
        return entry

    def put(self, name: str, fill: Callable[[Path], None], *, replace: bool = False) -> None:
        """Add an entry that ``fill`` writes into the folder it is given; on a full disk there is just no entry.

        Args:
            name: Of the entry.
            fill: Writes its files.
            replace: Whether an entry that is there already goes; otherwise it stays.
        """
        entry = self.folder / name[:2] / name
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            staged = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
        except OSError:
            return
        try:
            fill(staged)
            if replace:
                shutil.rmtree(entry, ignore_errors=True)
            staged.rename(entry)
        except OSError:
            pass
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._trim()

    def drop(self, name: str) -> None:
        """Take an entry out, if it is there."""
        shutil.rmtree(self.folder / name[:2] / name, ignore_errors=True)

    def _trim(self) -> None:
        entries = []
        for entry in self.folder.glob("??/*"):
            with suppress(OSError):
                size = sum(f.stat().st_size for f in entry.rglob("*") if f.is_file())
                entries.append((entry.stat().st_mtime, size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries, key=lambda e: e[0]):
            if total <= self.limit:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def code_hash() -> str:
    """SHA-256 of graphc's own sources, so that a changed pass never finds what the old one made."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(p for folder in (root, root / "passes", root / "backends") for p in folder.glob("**/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
