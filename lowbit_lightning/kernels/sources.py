"""The texts for the compilers: files of ``src/``, specialised by macros, with the headers that Python generates.

Both compilers get their texts from here, so that dtypes, code maps, rules and variants of a step are named only once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.compile import source_text
from lowbit_lightning.kernels.structs import cpp_settings

CPP_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
"""The name of a dtype in ``src/vec.h`` and ``src/gpu.h``."""
DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(CPP_TYPES)}
"""The number of a dtype as an argument of kernels."""
MAP_NUMBERS = {"dynamic_signed": 0, "dynamic_unsigned": 1, "custom": 2}
"""The number of a codebook as an argument or macro."""


@cache
def specialised(source: str, rule: str = "", **macros: torch.dtype | int) -> str:
    """``src/SOURCE`` with lines ``#define NAME VALUE`` before it: dtypes as in ``CPP_TYPES``, flags as 0 or 1."""
    defines = [f"#define {k} {CPP_TYPES[v] if isinstance(v, torch.dtype) else int(v)}" for k, v in macros.items()]
    generated = {"dynamic_tables.h": formats.cpp_tables(), "step_settings_struct.h": cpp_settings()}
    if rule:
        generated["rule.h"] = rules.get(rule).cpp()
    return source_text(source, prelude="\n".join(defines), generated=generated)


class StepVariant(NamedTuple):
    """The case that an optimizer step is compiled for. ``coded``: that of ``StepArguments``."""

    rule: str
    param: torch.dtype
    grad: torch.dtype
    coded: int
    block_size: int
    stochastic: bool = False
    remainder: bool = False

    @classmethod
    def of(cls, arguments: StepArguments, grad: torch.dtype) -> StepVariant:
        a, param = arguments, arguments.params[0].dtype
        stochastic = a.stochastic_rounding and param == torch.bfloat16
        return cls(a.rule, param, grad, a.coded, a.block_size, stochastic, bool(a.remainders))

    def text(self, source: str) -> str:
        """``src/SOURCE`` for this variant."""
        types = {"PARAM": self.param, "GRAD": self.grad, "CODED": self.coded, "BLOCK": self.block_size}
        return specialised(source, self.rule, **types, STOCHASTIC=self.stochastic, REMAINDER=self.remainder)
