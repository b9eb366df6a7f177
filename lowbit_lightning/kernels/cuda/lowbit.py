"""Low-bit weights by plain torch on the GPU, as the reference has them: right, but not fast. A warning says so once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from lowbit_lightning.kernels.reference import lowbit


@cache
def _warn() -> None:
    warnings.warn(
        "low-bit weights on a GPU are decoded and multiplied by plain torch: the numbers are right, the speed is below "
        "that of a high-precision layer, and a product decodes its whole weight. There is no kernel of our own yet",
        stacklevel=2,
    )


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def warned(*arguments: Any) -> Any:
        _warn()
        return function(*arguments)

    return warned


lowbit_dequantize = _plain(lowbit.lowbit_dequantize)
lowbit_embedding = _plain(lowbit.lowbit_embedding)
lowbit_gemv = _plain(lowbit.lowbit_gemv)
lowbit_matmul = _plain(lowbit.lowbit_matmul)
lowbit_matmul_backward = _plain(lowbit.lowbit_matmul_backward)
lowbit_quantize = _plain(lowbit.lowbit_quantize)
