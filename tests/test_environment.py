"""What is said on how to install the rest of graphc."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from graphc import environment


class Installed:
    """A distribution that an installer has put there."""

    def __init__(self, origin: dict[str, Any] | None) -> None:
        self._origin = origin

    def read_text(self, name: str) -> str | None:
        return json.dumps(self._origin) if name == "direct_url.json" and self._origin is not None else None


@pytest.mark.parametrize(
    "origin, command",
    [
        ({"url": "file:///src/graphc", "dir_info": {"editable": True}}, "pip install --editable '/src/graphc[hf]'"),
        ({"url": "file:///src/graphc", "dir_info": {}}, "pip install 'graphc[hf] @ file:///src/graphc'"),
        ({"url": "file:///g.whl", "archive_info": {}}, "pip install 'graphc[hf] @ file:///g.whl'"),
        (
            {"url": "https://host/graphc.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'graphc[hf] @ git+https://host/graphc.git@abc'",
        ),
        (None, "pip install 'graphc[hf]'"),
    ],
)
def test_extras_come_from_where_graphc_came_from(
    origin: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "distribution", lambda name: Installed(origin))
    assert environment.to_install("hf") == command


def test_a_checkout_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(environment, "distribution", missing)
    checkout = Path(environment.__file__).parents[1]
    assert environment.to_install("cpu") == f"pip install --editable '{checkout}[cpu]'"
