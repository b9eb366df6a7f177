"""examples/bert.py: its texts, its verdict, and one small run of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bert_text import Texts, read_folder


class Words:
    """A tokenizer: a number for each word, by its length."""

    def __call__(self, texts: list[str], max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        padded = [row + [0] * (max_length - len(row)) for row in rows]
        ids = torch.tensor(padded)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    for name, word in (("long", "words"), ("short", "a")):
        (tmp_path / name).mkdir()
        for number in range(1, 13):
            (tmp_path / name / f"{number}.txt").write_text(" ".join([word] * number))
    return Texts(read_folder(tmp_path), Words(), length=6, held_out=8)


def test_each_text_is_either_held_out_or_trained_on(texts: Texts) -> None:
    ids, mask, classes = (torch.cat(parts) for parts in zip(*texts.held_out(3), strict=True))
    assert len(ids) == 8
    assert len(texts) == 24 - 8
    assert texts.classes == ["long", "short"]
    assert torch.equal(classes, texts.held_out_classes)
    assert torch.equal(classes == 0, ids[:, 0] == 5)  # "words"
    assert torch.equal(mask, (ids > 0).long())


def test_batches_of_a_seed_are_the_same(texts: Texts) -> None:
    first, again, other = (texts.batches(4, 5, seed) for seed in (1, 1, 2))
    assert [len(b[0]) for b in first] == [5] * 4
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert not all(torch.equal(x[0], y[0]) for x, y in zip(first, other, strict=True))


def test_too_few_texts_are_refused(tmp_path: Path, texts: Texts) -> None:
    with pytest.raises(SystemExit, match="there are 24 texts, and half of them are to train on"):
        Texts(read_folder(tmp_path), Words(), length=6, held_out=13)
    with pytest.raises(SystemExit, match="at least two folders"):
        read_folder(tmp_path / "long")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bert

    assert bert.main(f"--seeds 1 --steps 2 --held-out 64 --out {tmp_path}".split()) in (0, 1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["trained"]) == {"fp32", "int8-mixed", "nf4 + LoRA"}
    assert set(results["used"]) == {"fp32", "int8", "nf4", "int3", "int2"}
    plain, low = results["trained"]["fp32"]["bytes"], results["trained"]["int8-mixed"]["bytes"]
    assert plain["states"] == pytest.approx(2 * plain["parameters"], rel=1e-3)
    assert low["states"] < 0.27 * plain["states"]
    assert (tmp_path / "bert.png").stat().st_size > 10_000
    assert "| nf4 + LoRA |" in capsys.readouterr().out
