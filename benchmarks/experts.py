"""A block of a mixture of experts (8 experts, 2 for each token, as in Mixtral), forward and backward, beside torch.

    python benchmarks/experts.py [--widths 512,1024] [--output FOLDER]

Rivals are torch's own experts in float32 and bfloat16: an expert at a time (``nn.functional.linear``), and
``nn.functional.grouped_mm`` for all. int8 runs with activations in float32, and in bfloat16 as under autocast; its
ratio is to the fastest rival. The inner width is 3.5 times the width, as Mixtral's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _common import HOW_TO_READ, Candidate, Report, measure, parser
from torch import Tensor, nn

from lowbit_lightning.layers import Experts, Int8Experts
from lowbit_lightning.layers.moe import run_experts

EXPERTS, TOP_K, TOKENS = 8, 2, 2048
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class Grouped(Experts):
    """All experts by ``grouped_mm``."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def project(name: str, x: Tensor, offs: Tensor) -> Tensor:
            weight = getattr(self, name)
            return nn.functional.grouped_mm(x, weight.mT, offs=offs.to(x.device, torch.int32))

        return run_experts(self, project, hidden_states, top_k_index, top_k_weights)


RIVALS: dict[str, tuple[type[Experts], torch.dtype]] = {
    "one by one, float32": (Experts, FLOAT32),
    "one by one, bfloat16": (Experts, BFLOAT16),
    "grouped_mm, float32": (Grouped, FLOAT32),
    "grouped_mm, bfloat16": (Grouped, BFLOAT16),
}
OURS: dict[str, tuple[type[Experts], torch.dtype]] = {
    "int8, float32": (Int8Experts, FLOAT32),
    "int8, bfloat16": (Int8Experts, BFLOAT16),
}


def block(kind: type[Experts], width: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Weights stay in float32 where int8 or bfloat16 is computed under autocast, as in training."""
    torch.manual_seed(0)
    experts = kind(EXPERTS, width, 7 * width // 2, device=device)
    x = torch.randn(TOKENS, width, device=device).requires_grad_()
    weights, index = torch.randn(TOKENS, EXPERTS, device=device).softmax(-1).topk(TOP_K)
    dy = torch.randn(TOKENS, width, device=device)
    if kind is Grouped:  # it knows no autocast
        experts.to(dtype)

    def run() -> None:
        with torch.autocast(device, BFLOAT16, enabled=dtype == BFLOAT16 and kind is not Grouped):
            y = experts(x.to(dtype), index, weights)
        torch.autograd.grad(y, (x, *experts.parameters()), dy.to(y.dtype))

    return run


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--widths", default="512,1024")
    arguments = options.parse_args()
    report = Report("Experts", arguments)
    report.add(HOW_TO_READ, f"{TOKENS} tokens, {EXPERTS} experts, {TOP_K} for each token.", "")
    for width in map(int, arguments.widths.split(",")):
        found = measure(
            [
                Candidate(name, partial(block, kind, width, dtype, arguments.device))
                for name, (kind, dtype) in {**RIVALS, **OURS}.items()
            ],
            arguments,
        )
        base = min((c.median for c in found if c.name in RIVALS), default=float("nan"))
        rows = [[c.name, f"{1e3 * c.median:.0f} ms", c.spread, f"{base / c.median:.2f}x"] for c in found]
        report.add(f"Width {width}:", "")
        report.table(["experts", "median", "spread", "fastest rival / this"], rows)
    report.save()


if __name__ == "__main__":
    main()
