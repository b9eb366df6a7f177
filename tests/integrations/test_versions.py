from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit_lightning.integrations import versions

ROOT = Path(__file__).resolve().parents[2]


def test_the_extra_asks_for_the_same_versions() -> None:
    line = re.search(r"^transformers = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line is not None
    assert set(re.findall(r'"([^"]+)"', line[1])) == {f"{name}{wanted}" for name, wanted in versions.SUPPORTED.items()}


@pytest.mark.parametrize("found", ["4.57.0", "6.0.0"])
def test_another_version_is_refused_by_name(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: found)
    with pytest.raises(versions.UnsupportedVersion, match=rf"transformers>=5.*found {re.escape(found)}.*pip install"):
        versions.check("transformers")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.SUPPORTED, "no-such-library", ">=1")
    with pytest.raises(versions.UnsupportedVersion, match="needs no-such-library>=1, which is missing"):
        versions.check("no-such-library")
    versions.check("no-such-library", optional=True)
