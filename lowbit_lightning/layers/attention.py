"""``Int8MultiheadAttention``: ``nn.MultiheadAttention`` whose projections run in int8.

What it computes
----------------
Four linear layers around an attention. Its input projections are the products of this layer: of one matrix ``[3 E, E]``
if query, key and value are one tensor, so that it is quantised once; of two or three otherwise. The output projection
is a layer of its own, ``out_proj``, with products of its own. The attention between them is
``scaled_dot_product_attention``, or where its weights are asked for two matmuls and a softmax, in high precision.

What torch's own module does besides
------------------------------------
In evaluation it hands all weights to one fused op, and ``nn.TransformerEncoderLayer`` hands those of its linear layers
to another. Neither knows int8. This layer has a forward of its own, and tells the encoder's layer that it doesn't
qualify (``_qkv_same_embed_dim``); so evaluation runs in int8 too, where that pays. ``nn.TransformerEncoder`` may give
its layers nested tensors instead of a padding mask; these are padded for the attention, and the results nested again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowbit_lightning.layers.int8 import Int8Matrix, Products, Projections, adopt, linear


class Int8OutProjection(Int8Matrix, NonDynamicallyQuantizableLinear):
    """The output projection of an attention in int8; ``nn.MultiheadAttention`` has a class of its own for it."""

    plain = NonDynamicallyQuantizableLinear


class Int8MultiheadAttention(Projections, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with its projections in int8: same parameters, same ``state_dict``, same results up to
    rounding.

    Args:
        args, kwargs: as for ``nn.MultiheadAttention``, and the fields of ``Products``. ``bias_k``, ``bias_v`` and the
            attention itself stay in high precision.

    A training step costs three int8 products for each matrix: 6 if query, key and value are the same tensor, 9 if key
    and value are, 12 otherwise. Evaluation runs in int8 from ``fewest_rows`` rows on, as ``Int8Linear`` does.

    Raises:
        ValueError, TypeError: in ``forward``, for shapes, dtypes or devices that don't fit; the error names the tensor.
    """

    plain: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in tuple(kwargs) if name in Products.__dataclass_fields__}
        nn.MultiheadAttention.__init__(self, *args, **kwargs)
        self.products = Products(**settings)
        adopt(self.out_proj, self.products)
        self.out_proj.adopted = False  # type: ignore[assignment]

    @property
    def _qkv_same_embed_dim(self) -> bool:  # type: ignore[override]
        """False for torch's fused paths. Its constructor, and a plain attention, find the true answer in the object."""
        return not hasattr(self, "products") and vars(self)["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        vars(self)["_qkv_same_embed_dim"] = value

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The matrices of the input projections: one, or those of query, key and value."""
        return weights_of(self)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The first of ``weights``."""
        return self.weights[0]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``; nested tensors in self-attention, without masks, in training too."""
        if query.is_nested or key.is_nested or value.is_nested:
            if query is not key or key is not value or key_padding_mask is not None or attn_mask is not None:
                raise ValueError("a nested query must be the key and the value too, without masks: pad it otherwise")
            return self._nested(query, need_weights, average_attn_weights)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint that attn_mask is causal; give attn_mask too")
        single = query.ndim == 2
        parts = self._projections(query, key, value)
        q, k, v = (self._heads(part, single) for y in parts for part in y.split(self.embed_dim, -1))
        if k.shape[:3] != v.shape[:3] or len(q) != len(k):
            raise ValueError(f"key and value must fit the query, got {[tuple(x.shape) for x in (query, key, value)]}")
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        keys = k.shape[2]
        k, v = self._lengthened(k, self.bias_k), self._lengthened(v, self.bias_v)
        causal = is_causal and key_padding_mask is None and not need_weights and k.shape[2] == keys
        if mask is not None and k.shape[2] > keys:
            mask = nn.functional.pad(mask, (0, k.shape[2] - keys))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            y, weights = _weighed(q, k, v, mask, dropout)
        else:
            mask = None if causal else mask
            y, weights = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal), None
        y = self.out_proj(y.permute(self._order(single, back=True)).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (y.squeeze(0), None if weights is None else weights.squeeze(0)) if single else (y, weights)

    # -- projections, heads, masks -----------------------------------------------------------------------------------

    def _projections(self, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """The projected query, key and value, side by side where one product gives them."""
        sizes = [1, 1, 1] if self.in_proj_weight is None or key is not value else [3] if query is key else [1, 2]
        sizes = [n * self.embed_dim for n in sizes]
        matrices = self.weights if self.in_proj_weight is None else self.in_proj_weight.split(sizes)
        biases = [None] * len(sizes) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        for number, (x, matrix, bias) in enumerate(zip((query, key, value), matrices, biases, strict=False)):
            y = linear(self, x, matrix, bias, number)
            for hook in self._projection_hooks.values():
                hook(self, x, matrix, y)
            yield y

    def _order(self, single: bool, back: bool = False) -> tuple[int, ...]:
        """From the input's layout to ``[N, heads, L, head_dim]``, and back."""
        first = self.batch_first or single
        return (0, 2, 1, 3) if first else (2, 0, 1, 3) if back else (1, 2, 0, 3)

    def _heads(self, x: Tensor, single: bool) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, -1))
        return (x.unsqueeze(0) if single else x).permute(self._order(single))

    def _lengthened(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values ``[N, heads, S, head_dim]``, followed by those of ``add_bias_kv`` and ``add_zero_attn``."""
        one = len(x), self.num_heads, 1, self.head_dim
        more = [] if bias is None else [bias.to(x.dtype).view(1, *one[1:]).expand(one)]
        more += [x.new_zeros(one)] if self.add_zero_attn else []
        return torch.cat([x, *more], 2) if more else x

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask that is added to the scores ``[N, heads, L, S]``; its first three sizes may be 1."""
        n, heads, length, keys = *q.shape[:3], k.shape[2]
        of_scores = {(length, keys): (1, 1, length, keys), (n * heads, length, keys): (n, heads, length, keys)}
        of_keys: dict[tuple[int, ...], tuple[int, ...]] = {(n, keys): (n, 1, 1, keys)}
        if n == 1:
            of_keys[keys,] = (1, 1, 1, keys)
        scores = None if attn_mask is None else _added("attn_mask", attn_mask, of_scores, q.dtype)
        if key_padding_mask is None:
            return scores
        padding = _added("key_padding_mask", key_padding_mask, of_keys, q.dtype)
        return padding if scores is None else scores + padding

    def _nested(self, x: Tensor, need_weights: bool, average: bool) -> tuple[Tensor, Tensor | None]:
        if not self.batch_first:
            raise ValueError("a nested tensor needs batch_first=True")
        lengths = [len(part) for part in x.unbind()]
        padded = torch.nested.to_padded_tensor(x, 0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        unused = places >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        given = padded, padded, padded, unused, need_weights
        y, weights = self.forward(*given, average_attn_weights=average)  # so that hooks run once
        parts = [row[:n] for row, n in zip(y, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=x.layout), weights


def weights_of(attention: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """The matrices of its input projections: ``[3 E, E]``, or those of query, key and value."""
    packed: Tensor | None = attention.in_proj_weight
    if packed is not None:
        return (packed,)
    return attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight


def _added(name: str, mask: Tensor, shapes: Mapping[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added; ``shapes``: those that it may have, and as what it is viewed then."""
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be of shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    if mask.is_floating_point():
        return mask.to(dtype).view(shapes[tuple(mask.shape)])
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True: ignored) or float (added to the scores), got {mask.dtype}")
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return added.view(shapes[tuple(mask.shape)])


def _weighed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The attention and its weights, after dropout, as torch's module returns them."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = nn.functional.dropout(weights, dropout)
    return weights @ v, weights
