from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import hub_models


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder(name)``: where a model of ``support.hub_models`` is saved."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = hub_models.save(name, tmp_path_factory.mktemp("hub"))
        return made[name]

    return get
