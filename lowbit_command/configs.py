"""Packaged experiments: complete configs for lowbit fit. They are starting points: copy one and change it.

lowbit configs list
lowbit configs show gpt.yaml
lowbit configs copy gpt.yaml [mine.yaml]"""

from __future__ import annotations

import argparse
import shutil
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

# Name -> what it is, in one line: the files of lowbit_lightning/experiments/configs.
NAMES = {
    "gpt.yaml": "a GPT on text, int8 and 8-bit AdamW: minutes on two cores",
    "bert.yaml": "a BERT on text: it fills in masked bytes",
    "vision.yaml": "a vision transformer on handwritten digits, 8-bit Lion: a minute on two cores",
    "qlora.yaml": "adapters beside a GPT that is frozen in 4 bits",
    "sharded.yaml": "a GPT on several ranks: FSDP2 with 8-bit states, by torchrun",
    "deepspeed.yaml": "a GPT on several ranks: DeepSpeed's ZeRO with 8-bit states",
}


def folder() -> Path:
    """Where they lie. The package is looked for, not imported."""
    found = find_spec("lowbit_lightning")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "experiments" / "configs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "show", "copy"))
    parser.add_argument("name", nargs="?", help="as lowbit configs list names it")
    parser.add_argument("target", nargs="?", type=Path, help="copy: file or folder to write; default: here")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        for name, what in NAMES.items():
            print(f"{name:18}{what}")
        return 0
    source = path_of(args.name)
    if args.action == "show":
        print(source.read_text(), end="")
        return 0
    target = args.target or Path()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise FileExistsError(f"{target} exists: name another file, or remove it")
    shutil.copyfile(source, target)
    print(f"{target}: lowbit fit --config {target}")
    return 0


def path_of(name: str | None) -> Path:
    """The file of a packaged config, with or without ``.yaml``."""
    if name is None:
        raise ValueError(f"which one? There are {', '.join(NAMES)}")
    full = name if name.endswith(".yaml") else f"{name}.yaml"
    if full not in NAMES:
        near = get_close_matches(full, NAMES, n=1)
        raise ValueError(
            f"no packaged config {name!r}; {f'did you mean {near[0]}? ' if near else ''}There are {', '.join(NAMES)}"
        )
    return folder() / full
