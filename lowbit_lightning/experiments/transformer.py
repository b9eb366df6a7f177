"""What the example models share: a transformer block with rotary positions, what it remembers while it writes, and a
learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Rotary positions (Su et al., 2021): turns the pairs of ``x [..., context, channels]`` by angles that grow with
    the position, so that a product of two of them depends on their distance. ``first``: the position of the first."""
    frequency = 10_000 ** -torch.linspace(0, 1, x.shape[-1] // 2, dtype=torch.float32, device=x.device)
    angle = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * frequency
    a, b = x.float().chunk(2, dim=-1)
    turned = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)
    return turned.to(x.dtype)


class Past:
    """The keys and values of the positions that a block has seen (a KV cache), so that each is computed once.

    ``window``: so many of the latest are kept. Keys are turned by their positions before they are kept, and products
    depend on distances alone, so a text may be longer than the window.
    """

    def __init__(self, window: int) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.window, self.seen = window, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Those that were kept and these after them: ``[batch, heads, positions, channels]``."""
        self.seen += keys.shape[-2]
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), -2), torch.cat((self.values, values), -2)
        self.keys, self.values = keys[..., -self.window :, :], values[..., -self.window :, :]
        return keys, values


class Block(nn.Module):
    """Attention and a perceptron, each after a norm. ``causal``: a position sees only those before it. With a ``past``
    it sees those that were kept there too."""

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

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:  # [batch, context, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(t, t.shape[-1:]) for t in (q, k))  # bounded attention scores allow a higher learning rate
        if past is None:
            attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=self.causal)
        else:
            q, k = rotate(q, past.seen), rotate(k, past.seen)
            k, v = past.extend(k, v)
            new, seen = q.shape[-2], k.shape[-2]
            visible = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
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
