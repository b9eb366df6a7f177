"""Writes ``bitsandbytes_weights.safetensors``: low-bit weights as bitsandbytes saves them, and what they decode to.

Made with bitsandbytes 0.50.2 on a CPU; run it again where bitsandbytes is installed to try another version:
``python tests/data/make_bitsandbytes_weights.py``.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

KINDS = {  # name -> (shape, options of Linear4bit)
    "nf4": ((48, 128), {"quant_type": "nf4", "compress_statistics": False}),
    "nested": ((48, 128), {"quant_type": "nf4", "compress_statistics": True}),
    "fp4": ((16, 192), {"quant_type": "fp4", "compress_statistics": False}),
    "stored": ((16, 128), {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16}),
    "odd": ((6, 40), {"quant_type": "nf4", "compress_statistics": False}),
}
tensors = {}
for name, (shape, options) in KINDS.items():
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, **options)
    layer.weight.data.normal_()
    layer = layer.to("cpu")  # which quantises
    for key, value in layer.state_dict().items():
        tensors[f"{name}.{key}"] = value.contiguous()
    tensors[f"{name}.decoded"] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
torch.manual_seed(0)
layer = bnb.nn.Linear8bitLt(96, 40, bias=False, has_fp16_weights=False)
layer.weight.data.normal_()
layer = layer.to("cpu")
for key, value in layer.state_dict().items():
    tensors[f"int8.{key}"] = value.contiguous()
state = layer.state_dict()
tensors["int8.decoded"] = state["weight"].float() * state["SCB"].float().unsqueeze(1) / 127
path = Path(__file__).with_name("bitsandbytes_weights.safetensors")
save_file(tensors, path)
print(f"{path}: {path.stat().st_size} bytes")
