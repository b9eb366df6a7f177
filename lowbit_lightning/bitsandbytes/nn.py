"""``bitsandbytes.nn``: layers whose weight is a ``Params4bit`` or ``Int8Params``.

A layer is built in high precision and quantised when it is moved to a device ("cpu" too), or by its first forward.
State_dicts have bitsandbytes' entries. Every layer loads its own, quantised or not yet, and embeddings save too.

New code has a better choice in ``lowbit_lightning.quantize`` and ``layers.LowBitLinear``: more formats, blocks inside
rows, and weights that FSDP2 shards together with their scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.bitsandbytes import functional
from lowbit_lightning.bitsandbytes.parameters import Int8Params, Params4bit
from lowbit_lightning.bitsandbytes.products import MatmulLtState, matmul, matmul_4bit
from lowbit_lightning.bitsandbytes.quant_state import QuantState
from lowbit_lightning.bitsandbytes.refused import refusing
from lowbit_lightning.convert.bitsandbytes import STATE
from lowbit_lightning.layers.embedding import Embedding32bit, StableEmbedding
from lowbit_lightning.layers.lowbit import autocast_dtype

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
]

Embedding = Embedding32bit


class _Quantized(nn.Module):
    """A module whose ``weight`` brings entries of its own in the ``state_dict``."""

    weight: Any

    def _own(self) -> dict[str, Tensor]:
        """The entries beside ``weight``, by name; none before it is quantised."""
        raise NotImplementedError

    def _loaded(self, weight: Tensor, parts: dict[str, Tensor]) -> nn.Parameter | None:
        """The parameter of a saved weight and the entries beside it; None: it is loaded as by any module.

        Raises:
            ValueError: for what does not fit.
        """
        raise NotImplementedError

    def _follow(self) -> None:
        """Take over what the weight's quantisation has made. Nothing is assigned that is there already: a forward that
        assigns can't be compiled under activation checkpointing."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # which quantises a weight that is moved to a device
        self._follow()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": value.detach() for name, value in self._own().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        beside = [f"{prefix}{name}" for name in ("weight.", "SCB", "weight_format")]
        parts = {key.removeprefix(prefix): x for key, x in state_dict.items() if any(map(key.startswith, beside))}
        rest = {key: x for key, x in state_dict.items() if key.removeprefix(prefix) not in parts}
        key = f"{prefix}weight"
        if key in rest:
            try:
                made = self._loaded(rest[key], parts)
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
                made = self.weight
            if made is not None:
                self.weight = made
                rest[key] = made  # which is then loaded into itself
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _device(self, saved: Tensor) -> torch.device:
        return saved.device if self.weight.is_meta else self.weight.device


class _Quantized4bit(_Quantized):
    quant_state: QuantState | None = None
    """The weight's; kept here too, because FSDP replaces parameters by plain ones."""

    def _weight(self, weight: Tensor, quant_type: str, quant_storage: torch.dtype, compress: bool | None) -> Params4bit:
        return Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=compress,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    def _state(self) -> QuantState:
        weight = self.weight
        if isinstance(weight, Params4bit) and not weight.bnb_quantized:
            weight.quantize()
        self._follow()
        if self.quant_state is None:
            raise RuntimeError(
                f"{type(self).__name__} has codes without their quant_state: build its weight by "
                "Params4bit.from_prequantized, or load a whole state_dict"
            )
        return self.quant_state

    def _follow(self) -> None:
        state = getattr(self.weight, "quant_state", None)
        if state is not None and self.quant_state is not state:
            self.quant_state = state

    def _own(self) -> dict[str, Tensor]:
        state = getattr(self.weight, "quant_state", None) or self.quant_state
        return {} if state is None else {f"weight.{name}": x for name, x in state.as_dict(packed=True).items()}

    def _loaded(self, weight: Tensor, parts: dict[str, Tensor]) -> nn.Parameter | None:
        device = self._device(weight)
        if parts:
            made = Params4bit.from_prequantized(weight, parts, device=device)
            assert made.quant_state is not None
            if tuple(made.quant_state.shape) != self._shape():
                raise ValueError(f"must be of shape {self._shape()}, got {tuple(made.quant_state.shape)}")
            self.quant_state = made.quant_state
            return made
        if not isinstance(self.weight, Params4bit) or not self.weight.bnb_quantized:
            return None
        if not weight.is_floating_point() or tuple(weight.shape) != self._shape():
            raise ValueError(f"codes of shape {tuple(weight.shape)} without {STATE}nf4 or fp4 and the scales beside it")
        return self._weight(
            weight, self.weight.quant_type, self.weight.quant_storage, self.weight.compress_statistics
        ).to(device)

    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError


class Linear4bit(_Quantized4bit, nn.Linear):  # type: ignore[misc]  # both say what weight is
    """``nn.Linear`` with a frozen weight of 4 bits, for inference and for training adapters beside it.

    Args:
        input_features, output_features, bias, device: as for ``nn.Linear``.
        compute_dtype: the dtype of the product; None: autocast's, or the input's.
        compress_statistics, quant_type, quant_storage: as for ``functional.quantize_4bit``.

    Input ``[..., input_features]``, output ``[..., output_features]`` in the input's dtype.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = self._weight(self.weight, quant_type, quant_storage, compress_statistics)
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or autocast_dtype(x) or x.dtype
        return matmul_4bit(x.to(dtype), self.weight, self._state(), bias=self.bias).to(x.dtype)


class LinearFP4(Linear4bit):
    """``Linear4bit`` with ``quant_type="fp4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        settings = compute_dtype, compress_statistics, "fp4", quant_storage
        super().__init__(input_features, output_features, bias, *settings, device)


class LinearNF4(Linear4bit):
    """``Linear4bit`` with ``quant_type="nf4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        settings = compute_dtype, compress_statistics, "nf4", quant_storage
        super().__init__(input_features, output_features, bias, *settings, device)


class Embedding4bit(_Quantized4bit, nn.Embedding):  # type: ignore[misc]
    """``nn.Embedding`` with a frozen table of 4 bits.

    Args:
        num_embeddings, embedding_dim, dtype, device: as for ``nn.Embedding``; the output has ``dtype``.
        quant_type, quant_storage: as for ``functional.quantize_4bit``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = self._weight(self.weight, quant_type, quant_storage, False)

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        state = self._state()
        return functional.embedding_4bit(input, self.weight, state).to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """``Embedding4bit`` with ``quant_type="fp4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """``Embedding4bit`` with ``quant_type="nf4"``."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


# -- 8 bits ----------------------------------------------------------------------------------------------------------


class _Quantized8bit(_Quantized):
    def _own(self) -> dict[str, Tensor]:
        scales = getattr(self.weight, "SCB", None)
        if scales is None or self.weight.dtype != torch.int8:
            return {}
        return {"SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def _loaded(self, weight: Tensor, parts: dict[str, Tensor]) -> nn.Parameter | None:
        device, layout = self._device(weight), parts.get("weight_format")
        if layout is not None and int(layout) != 0:
            raise ValueError(f"weight_format must be 0, the layout by rows, got {int(layout)}")
        if "SCB" in parts:
            if weight.dtype != torch.int8 or self._trains():
                raise ValueError(
                    f"an SCB is the scale of an int8 weight that is not trained, got {weight.dtype} for a layer with "
                    f"has_fp16_weights={self._trains()}"
                )
            if weight.shape != self.weight.shape or parts["SCB"].shape != weight.shape[:1]:
                wanted, scales = tuple(self.weight.shape), tuple(parts["SCB"].shape)
                raise ValueError(
                    f"must be of shape {wanted} with an SCB for each row, got {tuple(weight.shape)}, {scales}"
                )
            return Int8Params(weight.to(device), requires_grad=False, SCB=parts["SCB"].float().to(device))
        if self.weight.dtype != torch.int8:
            return None
        if not weight.is_floating_point() or weight.shape != self.weight.shape:
            raise ValueError(f"codes of shape {tuple(weight.shape)} without the SCB beside them")
        return Int8Params(weight, requires_grad=False).to(device)

    def _trains(self) -> bool:
        return False


class Linear8bitLt(_Quantized8bit, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` that multiplies in int8 (LLM.int8()).

    Args:
        input_features, output_features, bias, device: as for ``nn.Linear``.
        has_fp16_weights: True keeps a float weight, which trains and is quantised in each forward, as
            ``layers.Int8Linear`` does; False keeps an int8 one, for inference and adapters.
        threshold: the magnitude from which an element of the input is an outlier, whose column is multiplied in high
            precision; 0: none. Without effect while a float weight is trained.
        index: must be None.

    Input ``[..., input_features]`` in any float dtype, output ``[..., output_features]`` in the same.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: None = None,
        device: Any = None,
    ) -> None:
        if index is not None:
            raise ValueError("index must be None: bitsandbytes reads it nowhere")
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState(threshold=threshold, has_fp16_weights=has_fp16_weights)
        self.weight = Int8Params(self.weight, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def _trains(self) -> bool:
        return self.state.has_fp16_weights

    def init_8bit_state(self) -> None:
        """Hand the weight's codes and scales to ``state``."""
        if isinstance(self.weight, Int8Params) and not self.state.has_fp16_weights:
            self.weight.quantize()
            self._follow()

    def _follow(self) -> None:
        weight, state = self.weight, self.state
        if isinstance(weight, Int8Params) and not state.has_fp16_weights and state.SCB is not weight.SCB:
            state.CB, state.SCB = weight.CB, weight.SCB

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        if self.state.is_training != self.training:
            self.state.is_training = self.training
        if not isinstance(self.weight, Int8Params) or self.state.has_fp16_weights:
            return matmul(x, self.weight, state=self.state, bias=self.bias)
        if self.weight.CB is None or self.state.SCB is not self.weight.SCB:
            self.init_8bit_state()
        own = MatmulLtState(self.weight.CB, self.weight.SCB, self.state.threshold, has_fp16_weights=False)
        return matmul(x, self.weight, state=own, bias=self.bias)


class Embedding8bit(_Quantized8bit, nn.Embedding):  # type: ignore[misc]
    """``nn.Embedding`` with a frozen int8 table; the output has ``dtype``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.quantize()
        scales = (weight.SCB / 127).unsqueeze(1)
        return kernels.lowbit_embedding(
            input, weight.data.view(torch.uint8), scales, "int8", self.embedding_dim, self.dtype
        )


__getattr__ = refusing(
    __name__,
    {
        "OutlierAwareLinear": "it is a base class without an implementation; subclass nn.Linear",
        "parametrize": "experts, parameters of three dimensions, are quantised by lowbit_lightning.quantize(model)",
        "Linear8bit": "bitsandbytes has removed it; use Linear8bitLt, or lowbit_lightning.layers.Int8Linear to train",
        "LinearInt8": "bitsandbytes has removed it; use Linear8bitLt",
    },
)
