"""examples/bert.py: its texts, its verdict, and one small run of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import bert_larger
import pytest
import torch
from bert_larger import Try
from bert_report import Result, complaints, difference, table
from bert_text import Texts, read_folder

from lowbit_lightning.convert import weight_report

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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
    batches = list(texts.held_out(3))
    assert sum(len(ids) for ids, *_ in batches) == 8
    assert len(texts) == 24 - 8
    assert texts.classes == ["long", "short"]
    assert torch.equal(torch.cat([classes for *_, classes in batches]), texts.held_out_classes)
    for ids, mask, classes in batches:
        assert torch.equal(classes == 0, ids[:, 0] == 5)  # "words"
        assert torch.equal(mask, (ids > 0).long())


def test_a_batch_is_as_wide_as_its_longest_text(texts: Texts) -> None:
    widths = [ids.shape[1] for ids, *_ in texts.held_out(1)]
    assert widths == sorted(widths)
    assert len(set(widths)) > 1
    for ids, mask, _ in (*texts.held_out(3), *texts.batches(9, 2, 1)):
        assert mask.sum(1).max() == ids.shape[1] == mask.shape[1]


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


# -- the verdict -------------------------------------------------------------------------------------------------------


def test_differences_are_paired() -> None:
    base, low = Result([70.0, 60.0, 50.0]), Result([69.0, 59.5, 48.5])
    mean, error = difference(low, base)
    assert mean == pytest.approx(-1)
    assert error == pytest.approx(0.5 / 3**0.5)
    assert "nan" in f"{difference(Result([1.0]), Result([2.0]))[1]}", "one seed tells nothing of the spread"


def test_what_is_worse_than_it_may_be_is_said() -> None:
    base = Result([70.0], [100.0], {"weights": 1000})
    trained = {"fp32": base, "int8-mixed": Result([69.1]), "nf4 + LoRA": Result([68.1])}
    used = {"fp32": base, "nf4": Result([69.1], [50.0], {"weights": 250})}
    assert complaints(trained, used) == []
    assert len(complaints({**trained, "nf4 + LoRA": Result([67.9])}, used)) == 1
    assert "nf4 is 1.5 points" in complaints(trained, {**used, "nf4": Result([68.5])})[0]
    assert "| nf4 | 69.1 | -0.9 ± nan | 0.0 MB (4.0x less) | 0.50 |" in table(used, "used in")


# -- a larger BERT -----------------------------------------------------------------------------------------------------


def test_the_largest_that_fits_is_tried_and_what_does_not_fit_beside_it() -> None:
    sizes = {"fp32": (1, 4, 16), "int8-mixed": (1, 2, 8), "nf4 + LoRA": (1, 1, 3)}
    found = [
        Try(way, shape, planned[number], fits=planned[number] <= 3)
        for number, shape in enumerate(("small", "base", "large"))
        for way, planned in sizes.items()
    ]
    tried = [(one.shape, one.way, one.fits) for one in bert_larger.chosen(found)]
    assert tried == [
        ("small", "fp32", True),
        ("base", "fp32", False),
        ("base", "int8-mixed", True),
        ("large", "fp32", False),
        ("large", "int8-mixed", False),
        ("large", "nf4 + LoRA", True),
    ]


def test_a_try_that_ends_otherwise_than_planned_is_said() -> None:
    as_planned = [
        Try("fp32", "base", 9, fits=False, seconds=1, failed="can't allocate memory"),
        Try("fp32", "small", 1, fits=True, seconds=1),
        Try("fp32", "large", 99, fits=False),
    ]
    assert bert_larger.complaints(as_planned) == []
    assert ["**trained**" in line for line in bert_larger.table(as_planned, 5).splitlines()[2:]] == [False] * 5
    one = replace(as_planned[1], failed="can't allocate memory")
    assert "can't allocate memory" in bert_larger.complaints([one])[0]
    assert bert_larger.complaints([replace(as_planned[0], failed=None)])


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux")
def test_the_limit_limits() -> None:
    """In a process of its own: what fits can be allocated and freed again and again, though something that was
    allocated later stays; what doesn't is refused."""
    script = """
        import bert_limit, torch
        bert_limit.free_at_once()
        bert_limit.limit_memory(100_000_000)
        torch.zeros(30_000_000, dtype=torch.uint8)
        last = [torch.zeros(4_000_000, dtype=torch.uint8) for _ in range(20)][-1:]
        for _ in range(3):
            torch.zeros(80_000_000, dtype=torch.uint8)
        held = torch.zeros(50_000_000, dtype=torch.uint8)
        try:
            torch.zeros(80_000_000, dtype=torch.uint8)
        except RuntimeError as error:
            print(bert_limit.refusal(error))
        print(bert_limit.refusal(ValueError("shape")), bert_limit.refusal(MemoryError()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=EXAMPLES, check=True
    )
    said, others = done.stdout.splitlines()[-2:]
    assert "can't allocate memory: you tried to allocate 80000000 bytes" in said
    assert others == "None MemoryError"


@pytest.mark.parametrize("way", bert_larger.WAYS)
def test_a_model_without_values_gets_some_and_trains(way: str) -> None:
    model = bert_larger.attempt(way, (1, 64), bert_larger.random_batch(2, 8))
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    low = weight_report(model).layers
    assert bool(low) == (way == "nf4 + LoRA")
    assert not any("classifier" in name for name in low)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bert

    assert bert.main(
        f"--seeds 1 --steps 2 --lora-steps 2 --held-out 64 --budget 0 --control --output {tmp_path}".split()
    ) in (
        0,
        1,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["trained"]) == {"fp32", "int8-mixed", "fp32 + LoRA", "nf4 + LoRA"}
    assert set(results["used"]) == {"fp32", "int8", "nf4, first layer int8", "nf4", "int3", "int2"}
    plain, low = results["trained"]["fp32"]["bytes"], results["trained"]["int8-mixed"]["bytes"]
    assert plain["states"] == pytest.approx(2 * plain["parameters"], rel=1e-3)
    assert low["states"] < 0.27 * plain["states"]
    for theme in ("light", "dark"):
        assert "nf4 + LoRA" in (tmp_path / f"bert-{theme}.svg").read_text()
    assert "| nf4 + LoRA |" in capsys.readouterr().out
