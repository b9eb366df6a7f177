"""Which versions of other libraries the integrations work with; ``pyproject.toml`` asks for the same."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

SUPPORTED = {"accelerate": ">=1.3", "peft": ">=0.18", "transformers": ">=5,<6"}


class UnsupportedVersion(ImportError):
    """A library that an integration needs is missing, or of a version that the integration was not made for."""


def check(name: str, *, optional: bool = False) -> None:
    """Raise ``UnsupportedVersion`` unless the library is installed in a supported version. ``optional``: it may be
    missing."""
    wanted = SUPPORTED[name]
    advice = f"pip install '{name}{wanted}', or lowbit-lightning[transformers]"
    try:
        found = version(name)
    except PackageNotFoundError:
        if optional:
            return
        message = f"lowbit_lightning.integrations needs {name}{wanted}, which is missing: {advice}"
        raise UnsupportedVersion(message) from None
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        raise UnsupportedVersion(f"lowbit_lightning.integrations works with {name}{wanted}, found {found}: {advice}")
