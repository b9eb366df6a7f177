"""What the example models share: a transformer block with rotary positions, and a learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021): turns the pairs of ``x [..., context, channels]`` by angles that grow with
    the position, so that a product of two of them depends on their distance."""
    frequency = 10_000 ** -torch.linspace(0, 1, x.shape[-1] // 2, device=x.device)
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)
    return turned.to(x.dtype)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm. ``causal``: a position sees only those before it."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} has to be a multiple of heads={heads}")
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))  # bounded attention scores allow a higher learning rate
        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=self.causal)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def initialise(model: nn.Module, layers: int) -> None:
    """Normally distributed weights; those that write into the residual stream shrink with the number of layers."""
    residual = 0.02 / math.sqrt(2 * layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=residual if name.endswith(("proj", "down")) else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class WarmupCosine(LambdaLR):
    """The learning rate grows linearly for ``warmup`` steps, and then falls by half a cosine to zero at ``steps``."""

    interval = "step"  # lowbit fit steps it after each optimizer step

    def __init__(self, optimizer: Optimizer, steps: int, warmup: int = 0) -> None:
        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        super().__init__(optimizer, factor)
