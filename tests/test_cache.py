"""The store: whole entries only, bounded, and harmless when it cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graphc.cache import Store, key


def test_what_was_put_is_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = key(a=1, b=["x"])
    assert store.get(name) is None
    store.put(name, lambda folder: (folder / "f").write_text("hello") and None)
    entry = store.get(name)
    assert entry is not None and (entry / "f").read_text() == "hello"


def test_the_key_depends_on_every_part_and_not_on_their_order() -> None:
    assert key(a=1, b=2) == key(b=2, a=1)
    assert len({key(a=1), key(a=2), key(b=1), key(a=[1])}) == 4


def test_an_entry_that_fails_half_way_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    store.put(key(a=1), fill)
    assert store.get(key(a=1)) is None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    store, name = Store(tmp_path), key(a=1)
    store.put(name, lambda folder: (folder / "f").write_text("first") and None)
    store.put(name, lambda folder: (folder / "f").write_text("second") and None)
    entry = store.get(name)
    assert entry is not None and (entry / "f").read_text() == "first"
    assert not list(tmp_path.rglob(".new-*"))


def test_the_entries_unused_longest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHC_CACHE_LIMIT", "250")
    store = Store(tmp_path)
    names = [key(n=n) for n in range(3)]
    for age, name in zip((300, 100, 200), names, strict=True):
        store.put(name, lambda folder: (folder / "f").write_bytes(b"x" * 100) and None)
        entry = store.get(name)
        if entry is not None:
            os.utime(entry, (age, age))
    store.put(key(n=9), lambda folder: (folder / "f").write_bytes(b"x") and None)
    assert [store.get(n) is not None for n in names] == [True, False, True]


def test_a_store_that_cannot_be_written_is_only_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    store.put(key(a=1), lambda folder: None)
    assert store.get(key(a=1)) is None
