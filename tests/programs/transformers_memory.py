"""Peak memory of loading a model in nf4, in one process: ``transformers_memory.py FOLDER SMALL`` prints JSON,
in bytes. SMALL is a folder with a small model of the same kind, which is loaded first.

``peak``: resident memory at its highest while the model loads, less that before; ``model``: of the loaded model's
tensors; ``layer``: of the largest decoder layer in high precision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, logging

from lowbit_lightning.integrations.transformers import LowBitConfig


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


folder = Path(sys.argv[1])
logging.disable_progress_bar()
torch.set_num_threads(1)
config = LowBitConfig("nf4")
AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)  # what is imported and compiled late
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
before = status("VmRSS")
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
peak = status("VmHWM") - before
held = {id(x): x.nbytes for x in (*model.parameters(), *model.buffers())}
with torch.device("meta"):
    plain = AutoModelForCausalLM.from_config(model.config)
whole = sum(p.numel() * 2 for p in plain.parameters())
layer = max(sum(p.numel() * 2 for p in one.parameters()) for one in plain.model.layers)
print(json.dumps({"peak": peak, "model": sum(held.values()), "layer": layer, "whole": whole}))
