"""What the compilers are given: files of ``src/``, specialised by macros, with the headers that Python generates.

Both compilers get it from here, so that a dtype, a code map, a rule and the variants of a step are named once.
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
"""A dtype's name in ``src/vec.h`` and ``src/gpu.h``."""
DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(CPP_TYPES)}
"""A dtype as an argument."""
MAP_NUMBERS = {"dynamic_signed": 0, "dynamic_unsigned": 1, "custom": 2}
"""A codebook as an argument or macro."""


@cache
def specialised(source: str, rule: str = "", **macros: torch.dtype | int) -> str:
    """``src/SOURCE`` with ``#define NAME VALUE`` before it: dtypes by their names there, flags as 0 or 1."""
    defines = [f"#define {k} {CPP_TYPES[v] if isinstance(v, torch.dtype) else int(v)}" for k, v in macros.items()]
    generated = {"dynamic_tables.h": formats.cpp_tables(), "step_settings_struct.h": cpp_settings()}
    if rule:
        generated["rule.h"] = rules.get(rule).cpp()
    return source_text(source, prelude="\n".join(defines), generated=generated)


class StepVariant(NamedTuple):
    """What an optimizer step is compiled for. Bit s of ``coded``: state s is 8-bit codes."""

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
        coded = sum([1 << s for s, state in enumerate(a.states) if state[0].dtype == torch.uint8])
        stochastic = a.stochastic_rounding and param == torch.bfloat16
        return cls(a.rule, param, grad, coded, a.block_size, stochastic, bool(a.remainders))

    def text(self, source: str) -> str:
        """``src/SOURCE`` for this variant."""
        types = {"PARAM": self.param, "GRAD": self.grad, "CODED": self.coded, "BLOCK": self.block_size}
        return specialised(source, self.rule, **types, STOCHASTIC=self.stochastic, REMAINDER=self.remainder)
