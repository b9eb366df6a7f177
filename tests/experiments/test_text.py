"""The text of the packaged experiments: the same on every machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowbit_lightning.experiments import Text, Windows, read_text


def test_text_of_a_folder_is_the_same_in_any_creation_order(tmp_path: Path) -> None:
    for folder, names in (("a", "xyz"), ("b", "zyx")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "f.txt").write_text(name * 3)
    first, second = (read_text(str(tmp_path / folder)) for folder in "ab")
    assert first == second
    assert sorted(first.split(b"\n")) == [b"xxx", b"yyy", b"zzz"]


def test_standard_library_is_there() -> None:
    text = read_text("")
    assert len(text) > 5_000_000
    assert b"import " in text


def test_windows_are_slices_and_repeat() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    one, two = (Windows(text, context=8, batch=3, count=5, seed=4) for _ in range(2))
    for i in range(len(one)):
        window = one[i]
        assert torch.equal(window, two[i])
        assert window.shape == (3, 9)
        assert torch.equal(window - window[:, :1], torch.arange(9).expand(3, 9))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("too short")
    with pytest.raises(ValueError, match=r"at least 90 are needed"):
        Text(str(tmp_path / "short"), context=8)
    with pytest.raises(FileNotFoundError, match="absent': no such file"):
        Text(str(tmp_path / "absent"))
