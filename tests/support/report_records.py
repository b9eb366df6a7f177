"""Records of runs that were never trained, with all that a report shows."""

from __future__ import annotations

import math
import random

from lowbit_command.report import Record

HOSTILE = "<script>alert(1)</script>"


def example(steps: int = 3000, seed: int = 0, bits: int = 8, name: str = "gpt-small") -> Record:
    """A long run that was resumed once; layers, codes and a previous run included."""
    chance = random.Random(seed)
    record = Record(
        name=name,
        folder=f"{name}/2026-11-30-16-0{seed}",
        status="finished",
        started="2026-11-30T16:00:12",
        ended="2026-11-30T17:12:40",
        steps=steps,
        seconds=steps * 1.45,
        sessions=[
            {"step": 0, "started": "2026-11-30T16:00:12"},
            {"step": steps // 2, "started": "2026-11-30T16:40:00"},
        ],
    )
    for step in range(steps):
        seconds, warm = step * 1.45, min(1.0, (step + 1) / 200)
        loss = 2.1 + 8.7 / (1 + step / 60) ** 0.9 + chance.gauss(0, 0.12) + (3 if step == 1200 and not seed else 0)
        record.curve("loss").add(step, seconds, loss)
        record.curve("samples per second").add(step, seconds, 176 + chance.gauss(0, 6) - (60 if step % 500 == 0 else 0))
        record.curve("learning rate").add(step, seconds, 6e-4 * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps)))
        if step % 250 == 249:
            record.curve("val_loss").add(step, seconds, 2.2 + 8.7 / (1 + step / 60) ** 0.9 + 0.02 * seed)
    states = 124_439_808 * (1 if bits == 8 else 4)
    record.memory = [
        {"kind": "parameters", "what": "float32, 148 tensors", "bytes": 497_759_232},
        {"kind": "gradients", "what": "float32", "bytes": 497_759_232},
        {"kind": f"{bits}-bit states", "what": "exp_avg: codes and scales", "bytes": states * 65 // 64},
        {"kind": f"{bits}-bit states", "what": "exp_avg_sq: codes and scales", "bytes": states * 65 // 64},
        {"kind": "32-bit states", "what": "of small parameters, and step counts", "bytes": 983_644},
        {"kind": "activations and temporary", "what": "the peak less all above", "bytes": 2_311_000_000},
    ]
    record.peak = {"of": "device", "bytes": 3_560_000_000}
    record.linear = {"int8": [48, 84_934_656], "high": [1, 38_597_376]}
    products = ("forward", "grad_input", "grad_weight")
    record.layers = {
        f"transformer.h.{i}.{part}": {p: 38 - 3 * (part == "mlp.c_proj") + chance.gauss(0, 1.2) for p in products}
        for i in range(12)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    record.layers["transformer.h.11.mlp.c_proj"]["grad_weight"] = 17.3
    record.layers_from = "last sample at step 2,900"
    record.codes = {
        "exp_avg": {"zero_code": 127, "counts": [int(9e4 * math.exp(-(((i - 127) / 52) ** 2))) for i in range(256)]},
        "exp_avg_sq": {
            "zero_code": 0,
            "counts": [int(2e5 * math.exp(-(((i - 150) / 40) ** 2))) + 9 for i in range(256)],
        },
    }
    record.ops = [
        *(["int8_matmul", "cuda", 432_000], ["quantize_both", "cuda", 288_000], ["optimizer_step", "cuda", steps]),
        ["lowbit_embedding", "reference", 3_000],
    ]
    record.config = {
        "trainer": {"precision": "int8-mixed", "max_steps": steps, "devices": 1, "gradient_clip_val": 1.0},
        "model": {
            "class_path": "gpt.GPT",
            "init_args": {"layers": 12, "width": 768, "note": HOSTILE},
        },
        "optimizer": {"class_path": "lowbit_lightning.optim.AdamW", "init_args": {"lr": 6e-4, "bits": bits}},
    }
    before = {**record.config, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}}}
    record.previous = {"folder": f"{name}/2026-11-29-09-30", "config": before}
    record.environment = {
        "packages": {"lowbit-lightning": "0.1.0", "torch": "2.9.0+cu130", "lightning": "2.6.6"},
        "device": "NVIDIA H200",
        "commit": "efa69c2",
    }
    return record
