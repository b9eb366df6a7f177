"""Loading takes the memory of the low-bit model and of one layer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import hub_models
from support.run_program import run_afresh

from lowbit_lightning.integrations.transformers.pages import AFTER, ReadPages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what memory a process has")
LARGE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 2048, "intermediate_size": 5632},
    "mixtral": {"hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 8},
}


def resident_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024


def test_pages_of_files_that_were_read_are_given_back(tmp_path: Path) -> None:
    save_file({"x": torch.arange(2 * AFTER // 8)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        x = file.get_slice("x")[:]
        total, held = x.sum(), resident_of_files()
        pages = ReadPages([str(tmp_path / "a.safetensors")])
        pages.read(AFTER - 1)
        assert resident_of_files() > held - AFTER
        pages.read(1)
        assert resident_of_files() < held - AFTER
        assert torch.equal(x.sum(), total), "they are read again"


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
def test_peak_of_eight_layers_in_four_shards(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 1024}
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = hub_models.MODELS[kind](**changes, **LARGE[kind])
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="230MB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    del model
    printed = run_afresh("transformers_memory.py", tmp_path, folder(kind), MALLOC_MMAP_THRESHOLD_="1048576")
    found = json.loads(printed.splitlines()[-1])
    assert found["whole"] > found["model"] + found["layer"] + 400e6, "else the bound would say nothing"
    assert found["peak"] <= found["model"] + found["layer"] + 200e6, found
