"""What an update rule is: one text that every backend runs.

A rule's text has up to four sections, in this order, of assignments that are legal Python *and* legal C++: ``+ - * /``
expressions and the functions named below. Python runs them on torch tensors (the reference), the host compiler on SIMD
vectors, NVRTC on single floats. Operations are rounded one by one (no fused multiply-add but ``fused``), in the order
written, so that backends agree to the bit.

* ``scalars:`` in double, once per parameter and step: everything that does not depend on the element, such as bias
  corrections. It sees the hyperparameters and ``step`` (1 on the first step). Functions: ``power(x, step)``,
  ``exponential``, ``minimum``, ``sqrt``, ``where(condition, a, b)``. Every name that it defines, and every
  hyperparameter, is a float32 in the sections below.
* ``direction:`` in float32, on every element: sees ``p`` (the parameter), ``g`` (the gradient) and the states, and
  changes the states. A state enters as its code's value, which is still to be multiplied by the scale of its block,
  named after it: ``exp_avg * exp_avg_scale``; in 32 bits the scale is 1. ``exp_avg * (beta1 * exp_avg_scale)`` costs
  one multiplication, since the scale is shared by a block (with a factor above 1 it could overflow for all of them).
  Functions: ``sqrt``, ``sign``, ``absolute``, ``maximum``, ``where``, and ``fused(a, b, c)``, which is a * b + c with
  one rounding. No number stands in it: numbers are scalars.
* ``norms of p, update:`` for rules with a trust ratio, in double, once per parameter and step: sees the 2-norms over
  the whole parameter of the values that it names, as ``p_norm`` and ``update_norm``, and defines further scalars.
  ``ratio(a, b)`` is a / b, or 1 where either is not positive.
* ``finish:`` in float32: changes ``p``.

Rules that share most of their text are its *variants*: ``if NAME:`` and ``else:`` choose lines, and are gone before
any backend sees the text. A variant has the hyperparameters and states that its lines use.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import dedent, indent
from types import CodeType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """One state of an optimizer: its name in ``optimizer.state[p]`` and whether it can be negative.

    ``slow``: a step changes it by less than 8 bits can hold, so that it would stand still; optimizers keep it in
    32 bits. Of a mean with decay ``beta`` a step changes about ``sqrt(2 * (1 - beta))`` of its spread, and half a
    step of the maps is 2 % of it.
    """

    name: str
    non_negative: bool = False
    slow: bool = False

    @property
    def codebook(self) -> str:
        return "dynamic_unsigned" if self.non_negative else "dynamic_signed"


@dataclass(frozen=True)
class Bound:
    """What a hyperparameter may be: in words, for errors, and as a test."""

    words: str
    allows: Callable[[float], bool]


FREE = Bound("a number", lambda x: x == x)
NOT_NEGATIVE = Bound("0 or more", lambda x: x >= 0)
FRACTION = Bound("in [0, 1)", lambda x: 0 <= x < 1)


def define(
    names: str | Mapping[str, str], text: str, *, hyper: Mapping[str, Bound], states: Sequence[State] = ()
) -> list[Rule]:
    """The rules of a text; the module's docstring says what may stand in it.

    Args:
        names: the rule's name; of a text with variants, each rule's name with the words that are true of it, as in
            ``{"sgd": "", "sgd_momentum": "momentum"}``.
        text: see above.
        hyper: hyperparameters with their bounds, ``lr`` first, in the order of ``StepArguments.hyper``. A name that no
            line uses is only a key of the optimizer's groups, to be checked.
        states: in the order of ``StepArguments.states``.

    Raises:
        ValueError: for a text that says something else than its names, hyperparameters and states do.
    """
    words_of = {names: ""} if isinstance(names, str) else names
    before, *pieces = re.split(r"^(scalars|direction|norms of [\w, ]+|finish):$", dedent(text), flags=re.MULTILINE)
    sections = {title: ast.parse(dedent(body)) for title, body in zip(pieces[::2], pieces[1::2], strict=True)}
    conditions = {n.test.id for tree in sections.values() for n in ast.walk(tree) if _is_choice(n)}
    rules = [_variant(name, sections, set(words.split()), hyper, states) for name, words in words_of.items()]
    if before.strip() or conditions != set(" ".join(words_of.values()).split()):
        raise ValueError(f"rules {list(words_of)}: text before the sections, or other conditions than {words_of}")
    if {state for rule in rules for state in rule.states} != set(states):
        raise ValueError(f"rules {list(words_of)}: a state that no line uses, among {states}")
    return rules


def _variant(
    name: str, sections: dict[str, ast.Module], words: set[str], hyper: Mapping[str, Bound], states: Sequence[State]
) -> Rule:
    parts, norms = {}, ""
    for title, tree in sections.items():
        part, _, of = title.partition(" of ")
        norms = norms or of
        parts[part] = "\n".join(ast.unparse(line) for line in _chosen(tree.body, words))
    used = set(re.findall(r"\w+", "\n".join(parts.values())))
    return Rule(
        name,
        tuple(key for key in hyper if key in used),
        tuple(state for state in states if state.name in used),
        parts["finish"],
        parts["direction"],
        parts.get("scalars", ""),
        tuple(re.findall(r"\w+", norms)),
        parts.get("norms", ""),
        bounds=hyper,
    )


def _is_choice(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name)


def _chosen(lines: list[ast.stmt], words: set[str]) -> Iterator[ast.stmt]:
    for line in lines:
        if _is_choice(line):
            yield from _chosen(line.body if line.test.id in words else line.orelse, words)
        else:
            yield line


@dataclass(frozen=True)
class Rule:
    """An update rule in its parts, as ``define`` makes it of a text. ``bounds``: of hyperparameters and group keys."""

    name: str
    hyper: tuple[str, ...]
    states: tuple[State, ...]
    finish: str
    direction: str = ""
    scalars: str = ""
    norms: tuple[str, ...] = ()
    norm_scalars: str = ""
    bounds: Mapping[str, Bound] = field(default_factory=dict, repr=False, compare=False)
    _code: dict[str, CodeType] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for part in ("scalars", "direction", "finish", "norm_scalars"):
            text = "\n".join(line.strip() for line in getattr(self, part).splitlines() if line.strip())
            object.__setattr__(self, part, text and text + "\n")
            self._code[part] = compile(text, f"<rule {self.name}.{part}>", "exec")
        if any(isinstance(node, ast.Constant) for node in ast.walk(ast.parse(self.direction + self.finish))):
            raise ValueError(f"rule {self.name!r}: a number in a float32 part; make it a scalar")
        used = {node.id for node in ast.walk(ast.parse(self.direction)) if isinstance(node, ast.Name)}
        for state in self.state_names:
            if f"{state}_scale" not in used or state not in _targets(self.direction):
                raise ValueError(f"rule {self.name!r}: direction must assign {state}, multiplied by {state}_scale")

    @cached_property
    def elementwise_scalars(self) -> tuple[str, ...]:
        """Names of the scalars that ``direction`` and ``finish`` use: the float32 scalars of a kernel, in this
        order."""
        known = (*self.hyper, *_targets(self.scalars), *_targets(self.norm_scalars))
        used = {n.id for n in ast.walk(ast.parse(self.direction + self.finish)) if isinstance(n, ast.Name)}
        return tuple(name for name in known if name in used)

    # -- Python ------------------------------------------------------------------------------------------------------

    def compute_scalars(self, hyper: list[float], step: float, norms: tuple[float, ...] | None) -> dict[str, float]:
        """The scalars in double; ``norms`` are the 2-norms named by ``self.norms``, or None before they are known."""
        names: dict[str, Any] = {**_DOUBLE_FUNCTIONS, **dict(zip(self.hyper, hyper, strict=True)), "step": step}
        exec(self._code["scalars"], names)
        if norms is not None:
            names |= {f"{name}_norm": value for name, value in zip(self.norms, norms, strict=True)}
            exec(self._code["norm_scalars"], names)
        return {name: names[name] for name in self.elementwise_scalars if name in names}

    def run(
        self, part: str, values: dict[str, Tensor], scalars: dict[str, float], device: torch.device
    ) -> dict[str, Tensor]:
        """Run ``direction`` or ``finish`` on float32 tensors; returns all names after it."""
        names: dict[str, Any] = {**_TENSOR_FUNCTIONS, **values}
        names |= {k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in scalars.items()}
        exec(self._code[part], names)
        return {k: v for k, v in names.items() if isinstance(v, Tensor)}

    # -- C++ ---------------------------------------------------------------------------------------------------------

    def cpp(self) -> str:
        """C++ text: ``RULE_*`` constants, ``struct Scalars``, ``rule_scalars``, ``rule_direction``, ``rule_finish``.

        ``rule_direction`` takes the scales of the states' blocks, ``const float*``.

        It expects ``LB_FN`` (function qualifiers), ``power`` and ``ratio`` for doubles, and for the value type ``V``
        the functions named in the module's docstring.
        """
        names = self.elementwise_scalars
        temporaries = [t for t in _targets(self.direction + self.finish) if t not in ("p", "g", *self.state_names)]
        load = [f"V& {name} = s[{i}];" for i, name in enumerate(self.state_names)]
        load += [f"V& {name} = t[{i}];" for i, name in enumerate(temporaries)]
        load += [f"const float {name} = c.{name};" for name in names]
        scales = [f"const float {name}_scale = scale[{i}];" for i, name in enumerate(self.state_names)]
        hyper = [f"const double {name} = hyper[{i}];" for i, name in enumerate(self.hyper)]
        norms = [f"    const double {name}_norm = sqrt(square_sums[{i}]);" for i, name in enumerate(self.norms)]
        late = _targets(self.norm_scalars)
        body = (
            "template <class V> LB_FN void rule_{part}(const Scalars& c, V& p, V& g, V* s{more}, V* t) {{\n{text}\n}}"
        )
        lines = [
            f"// generated from the rule {self.name}",
            f"constexpr int RULE_STATES = {len(self.states)}, RULE_HYPER = {len(self.hyper)};",
            f"constexpr int RULE_TEMPORARIES = {len(temporaries)};",
            f"#define RULE_NORMS {len(self.norms)}",
            "constexpr bool RULE_NON_NEGATIVE[4] = {"
            + ", ".join([str(s.non_negative).lower() for s in self.states] + ["false"] * (4 - len(self.states)))
            + "};",
            "struct Scalars { " + " ".join(f"float {name};" for name in names) + " };",
            "LB_FN Scalars rule_scalars(const double* hyper, double step, const double* square_sums) {",
            *[f"    {line}" for line in hyper],
            _cpp_statements(self.scalars, "double "),
            *[f"    double {name} = 0;" for name in late],
            *(["    if (square_sums) {", *norms, _cpp_statements(self.norm_scalars, ""), "    }"] if norms else []),
            "    Scalars c;",
            *[f"    c.{name} = (float){name};" for name in names],
            "    return c;\n}",
            body.format(
                part="direction",
                more=", const float* scale",
                text=indent("\n".join([*load, *scales]), "    ") + "\n" + _cpp_statements(self.direction, ""),
            ),
            body.format(
                part="finish",
                more="",
                text=indent("\n".join(load), "    ") + "\n" + _cpp_statements(self.finish, ""),
            ),
            "template <class V> LB_FN void rule_norm_values(V& p, V* t, V* n) {",
            *[f"    n[{i}] = {'p' if n == 'p' else f't[{temporaries.index(n)}]'};" for i, n in enumerate(self.norms)],
            "}",
        ]
        return "\n".join(line for line in lines if line) + "\n"

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.states)


def _targets(text: str) -> list[str]:
    """The names that a text assigns, in order, once each."""
    targets = [t for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign) for t in n.targets]
    return list(dict.fromkeys(t.id for t in targets if isinstance(t, ast.Name)))


def _cpp_statements(text: str, declare: str) -> str:
    return "\n".join(f"    {declare}{line};" for line in text.splitlines())


def power(x: float, n: float) -> float:
    """``x ** n`` for an integer n >= 0, by squaring: the same roundings in Python, C++ and CUDA, unlike ``pow``."""
    result, remaining = 1.0, int(n)
    while remaining:
        if remaining & 1:
            result *= x
        x *= x
        remaining >>= 1
    return result


def ratio(a: float, b: float) -> float:
    """The trust ratio a / b; 1 where either norm is not positive."""
    return a / b if a > 0 and b > 0 else 1.0


def exponential(x: float) -> float:
    """``e ** x``, within two roundings: a Taylor series after range reduction, the same everywhere, unlike
    ``exp``."""
    halvings = 0
    while x > 0.5 or x < -0.5:
        x *= 0.5
        halvings += 1
    result = 1.0
    for n in range(16, 0, -1):
        result = 1.0 + result * x / n
    for _ in range(halvings):
        result *= result
    return result


def _where(condition: bool, a: float, b: float) -> float:
    return a if condition else b


_DOUBLE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "power": power,
    "exponential": exponential,
    "minimum": min,
    "sqrt": math.sqrt,
    "where": _where,
    "ratio": ratio,
}


def _sqrt(x: Tensor) -> Tensor:
    # Correctly rounded, by way of double: torch.sqrt of float32 on the CPU may be MKL's, which is not.
    return x.double().sqrt().float()


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` of float32 with one rounding. In double the product is exact; the sum is rounded to odd, so that
    rounding it again to float32 is as good as rounding once (Boldo & Melquiond, 2008)."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # Knuth's two-sum: exact
    bits = total.view(torch.int64)
    outwards = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & total.isfinite() & (bits & 1 == 0)
    return torch.where(inexact, bits + outwards, bits).view(torch.float64).float()


_TENSOR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fused": fused,
    "sqrt": _sqrt,
    "sign": torch.sign,
    "absolute": torch.abs,
    "maximum": torch.maximum,
    "where": torch.where,
}
