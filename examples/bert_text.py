"""Real text in classes, without a network: docstrings of installed packages, or the files of a folder."""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
MOST, LEAST = 700, 60  # texts of a class; characters of a text

Batch = tuple[Tensor, Tensor, Tensor]


def read_docstrings() -> dict[str, list[str]]:
    """Package -> docstrings of those of ``PACKAGES`` that are installed, read from their sources without an import. A
    package's own name becomes "it": it would give the class away."""
    site = Path(sysconfig.get_paths()["purelib"])
    found = {name: list(_docstrings(site / name)) for name in PACKAGES if (site / name).is_dir()}
    return {name: [re.sub(name, "it", text, flags=re.IGNORECASE) for text in texts] for name, texts in found.items()}


def _docstrings(folder: Path) -> Iterator[str]:
    """At most ``MOST``, from files in the order of a hash of their names: a sample of the whole, on every machine."""
    seen: set[str] = set()
    names = (p for p in folder.rglob("*.py") if "test" not in p.relative_to(folder).as_posix())
    for path in sorted(names, key=lambda p: hashlib.sha256(p.relative_to(folder).as_posix().encode()).digest()):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            text = " ".join((ast.get_docstring(node) or "").split())[:400]
            if len(text) >= LEAST and text not in seen:
                seen.add(text)
                yield text
                if len(seen) == MOST:
                    return


def read_folder(folder: Path) -> dict[str, list[str]]:
    """Class -> texts: a folder for each class, a file for each text.

    Raises:
        SystemExit: if there are not two such folders at least.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise SystemExit(f"--text {folder}: a folder with at least two folders of text files is needed")
    return {one.name: [p.read_text(errors="replace") for p in sorted(one.iterdir()) if p.is_file()] for one in classes}


class Texts:
    """Texts as tokens, shuffled once: the first ``held_out`` to measure on, the others to train on. A batch is as wide
    as the longest of its texts.

    Raises:
        SystemExit: if too few texts are left to train on.
    """

    def __init__(self, texts: dict[str, list[str]], tokenizer: Any, length: int, held_out: int) -> None:
        self.classes, self.length = list(texts), length
        pairs = [(text, number) for number, name in enumerate(self.classes) for text in texts[name]]
        if len(pairs) < 2 * held_out:
            raise SystemExit(f"--held-out {held_out}: there are {len(pairs)} texts, and half of them are to train on")
        random.Random(0).shuffle(pairs)
        options = {"truncation": True, "max_length": length, "padding": "max_length", "return_tensors": "pt"}
        tokens = tokenizer([text for text, _ in pairs], **options)
        ids, mask, numbers = tokens["input_ids"], tokens["attention_mask"], torch.tensor([n for _, n in pairs])
        by_length = mask[:held_out].sum(1).argsort(stable=True)
        self._held_out: Batch = ids[by_length], mask[by_length], numbers[by_length]
        self._train: Batch = ids[held_out:], mask[held_out:], numbers[held_out:]

    def __len__(self) -> int:
        return len(self._train[0])

    @property
    def held_out_classes(self) -> Tensor:
        return self._held_out[2]

    def batches(self, count: int, size: int, seed: int) -> list[Batch]:
        """Random ones to train on; those of a seed are always the same."""
        chosen = torch.randint(len(self), (count, size), generator=torch.Generator().manual_seed(seed))
        return [_cut(*(part[one] for part in self._train)) for one in chosen]

    def held_out(self, size: int) -> Iterator[Batch]:
        """All of them, the shortest first."""
        return (_cut(*parts) for parts in zip(*(part.split(size) for part in self._held_out), strict=True))


def _cut(ids: Tensor, mask: Tensor, classes: Tensor) -> Batch:
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest], classes
