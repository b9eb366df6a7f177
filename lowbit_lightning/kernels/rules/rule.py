"""What an update rule is: one text that every backend runs.

It begins with two lines, of names separated by commas:

* ``hyper:`` lists the hyperparameters in the order of ``StepArguments.hyper``, ``lr`` first, with their bounds:
  ``lr >= 0``, ``0 <= beta1 < 1``, or the name alone. A hyperparameter that no line uses is a key of the optimizer's
  groups; only its bound is checked.
* ``states:`` lists the states in the order of ``StepArguments.states``: ``exp_avg``, or ``exp_avg_sq >= 0`` if it is
  never negative, or ``exp_avg_slow slow`` (see ``State``). A rule without states has no such line.

Then come up to four sections, in this order, of assignments that are legal Python *and* legal C++: ``+ - * /``
expressions and the functions named below. Python runs them on torch tensors (the reference), the host compiler on SIMD
vectors, NVRTC on single floats. Each operation is rounded on its own, in the order written (the only fused
multiply-add is ``fused``). So all backends give the same bits.

* ``scalars:`` runs in double, once per parameter and step. It computes everything that does not depend on the element,
  such as bias corrections. It sees the hyperparameters and ``step`` (1 on the first step). Functions:
  ``power(x, step)``, ``exponential``, ``minimum``, ``sqrt``, ``where(condition, a, b)``. Every name that it
  defines, and every hyperparameter, is a float32 in the sections below.
* ``direction:`` runs in float32, on every element. It sees ``p`` (the parameter), ``g`` (the gradient) and the states,
  and changes the states. The name of a state stands for the value of its code. The text multiplies it by the scale of
  its block: ``exp_avg * exp_avg_scale``. In 32 bits the scale is 1. ``exp_avg * (beta1 * exp_avg_scale)`` costs
  one multiplication, since the scale is shared by a block (with a factor above 1 it could overflow for all of them).
  Functions: ``sign``, ``maximum``, ``where``; ``fused(a, b, c)``, which is a * b + c with one rounding;
  and ``over_root(f, a, x, c, eps)``, which is f * a / (sqrt(x) * c + eps) of scalars f, c, eps and values a, x.
  As in torch, ``maximum`` of NaN is NaN and ``sign`` of NaN is 0; ``maximum`` of two zeros is the second.
  Numbers are not allowed here; define them as scalars.
* ``norms of p, update:`` is for rules with a trust ratio. It runs in double, once per parameter and step. It sees the
  2-norms, over the whole parameter, of the values that it names, as ``p_norm`` and ``update_norm``, and defines further
  scalars. ``ratio(a, b)`` is a / b, or 1 if either is not positive.
* ``finish:`` runs in float32 and changes ``p``.

Rules that share most of their text are *variants* of one text: ``if NAME:`` and ``else:`` choose lines. They are
resolved before any backend sees the text. A variant has the hyperparameters and states that its lines use.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from textwrap import dedent
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """One state of an optimizer: its name in ``optimizer.state[p]`` and whether it can be negative.

    ``slow``: a step changes the state by less than 8 bits can resolve, so it would never change. Optimizers keep it in
    32 bits. A step changes a mean with decay ``beta`` by about ``sqrt(2 * (1 - beta))`` of its spread; half the
    distance between two codes is 2 % of the value.
    """

    name: str
    non_negative: bool = False
    slow: bool = False

    @property
    def codebook(self) -> str:
        return "dynamic_unsigned" if self.non_negative else "dynamic_signed"


@dataclass(frozen=True)
class Bound:
    """The values that a hyperparameter may have: in words, for errors, and as a test."""

    words: str
    allows: Callable[[float], bool]


_BOUNDS = {
    "{}": Bound("a number", lambda x: x == x),
    "{} >= 0": Bound("0 or more", lambda x: x >= 0),
    "0 <= {} < 1": Bound("in [0, 1)", lambda x: 0 <= x < 1),
}
_STATES = {"{}": (False, False), "{} >= 0": (True, False), "{} slow": (False, True)}
_SECTIONS = ("scalars", "direction", "norms", "finish")


def define(names: str | Mapping[str, str], text: str) -> list[Rule]:
    """The rules of a text. The module's docstring defines the text's language.

    ``names``: the rule's name. For a text with variants, it maps each rule's name to the conditions that are true for
    it, as in ``{"sgd": "", "sgd_momentum": "momentum"}``.

    Raises:
        ValueError: if the text contains something that the language lacks, or leaves out something that it requires.
    """
    words_of = {names: ""} if isinstance(names, str) else names
    before, *pieces = re.split(r"^(\w.*?):", text, flags=re.MULTILINE)
    heads = dict(zip(pieces[::2], pieces[1::2], strict=True))
    bounds = dict(_items(heads.pop("hyper"), _BOUNDS))
    states = [State(name, *flags) for name, flags in _items(heads.pop("states", ""), _STATES)]
    of = next((head for head in heads if head.startswith("norms of ")), "")
    trees = {head.partition(" ")[0]: ast.parse(dedent(body)) for head, body in heads.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    choices = {ast.unparse(node.test) for node in nodes if isinstance(node, ast.If)}
    if before.strip() or not trees.keys() <= {*_SECTIONS} or choices != {*" ".join(words_of.values()).split()}:
        raise ValueError(f"rules {[*words_of]}: sections {[*heads]}, conditions {choices}; see rules/rule.py")
    rules = []
    for name, words in words_of.items():
        chosen = {part: _chosen(trees[part].body, words.split()) if part in trees else [] for part in _SECTIONS}
        lines = {part: "".join(f"{ast.unparse(line)}\n" for line in chosen[part]) for part in _SECTIONS}
        used = _names("".join(lines.values()))
        hyper = tuple(key for key in bounds if key in used)
        kept = tuple(state for state in states if state.name in used)
        rules.append(Rule(name, hyper, kept, tuple(re.findall(r"\w+", of)[2:]), lines, bounds))
    if {state for rule in rules for state in rule.states} != {*states}:
        raise ValueError(f"rules {[*words_of]}: a state that no line uses, among {states}")
    return rules


def _items(text: str, forms: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names that are separated by commas, each with what its form, as in ``"{} >= 0"``, stands for."""
    for item in filter(None, map(str.strip, text.split(","))):
        (name,) = set(re.findall(r"[a-z]\w*", item)) - {"slow"}
        form = item.replace(name, "{}")
        if form not in forms:
            raise ValueError(f"{item!r} must have one of the forms {[*forms]}")
        yield name, forms[form]


def _chosen(lines: list[ast.stmt], words: list[str]) -> Iterator[ast.stmt]:
    for line in lines:
        if isinstance(line, ast.If):
            yield from _chosen(line.body if ast.unparse(line.test) in words else line.orelse, words)
        else:
            yield line


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule, as ``define`` makes it. ``sections``: the lines of each; ``bounds``: of hyperparameters and keys
    of groups."""

    name: str
    hyper: tuple[str, ...]
    states: tuple[State, ...]
    norms: tuple[str, ...]
    sections: Mapping[str, str]
    bounds: Mapping[str, Bound]

    def __post_init__(self) -> None:
        if any(isinstance(node, ast.Constant) for node in ast.walk(ast.parse(self._elementwise))):
            raise ValueError(f"rule {self.name!r}: a number in a float32 part; make it a scalar")
        direction = self.sections["direction"]
        for state in self.state_names:
            if f"{state}_scale" not in _names(direction) or state not in _targets(direction):
                raise ValueError(f"rule {self.name!r}: direction must assign {state}, multiplied by {state}_scale")

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.states)

    @property
    def _elementwise(self) -> str:
        return self.sections["direction"] + self.sections["finish"]

    @cached_property
    def elementwise_scalars(self) -> tuple[str, ...]:
        """Names of the scalars that ``direction`` and ``finish`` use: the float32 scalars of a kernel, in this
        order."""
        known = (*self.hyper, *_targets(self.sections["scalars"]), *_targets(self.sections["norms"]))
        used = _names(self._elementwise)
        return tuple(name for name in known if name in used)

    # -- Python ------------------------------------------------------------------------------------------------------

    @cached_property
    def _code(self) -> dict[str, CodeType]:
        return {part: compile(text, f"<rule {self.name}: {part}>", "exec") for part, text in self.sections.items()}

    def compute_scalars(self, hyper: list[float], step: float, norms: tuple[float, ...] | None) -> dict[str, float]:
        """The scalars in double; ``norms`` are the 2-norms named by ``self.norms``, or None before they are known."""
        # NumPy's doubles: a division by zero gives infinity or NaN, as in C++, where Python's raise
        doubles = {name: np.float64(x) for name, x in zip((*self.hyper, "step"), (*hyper, step), strict=True)}
        names: dict[str, Any] = {**_DOUBLE_FUNCTIONS, **doubles}
        with np.errstate(all="ignore"):
            exec(self._code["scalars"], names)
            if norms is not None:
                names |= {f"{name}_norm": np.float64(x) for name, x in zip(self.norms, norms, strict=True)}
                exec(self._code["norms"], names)
        return {name: float(names[name]) for name in self.elementwise_scalars if name in names}

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

        ``rule_direction`` takes the scales of the states' blocks, ``const float*``. ``Roots`` has ``over``, which is
        ``over_root`` (``src/over_root.h``).

        It expects ``LB_FN`` (function qualifiers), ``power`` and ``ratio`` for doubles, and for the value type ``V``
        the functions named in the module's docstring; ``maximum`` is called ``maximum_or_nan``.
        """
        scalars, sections = self.elementwise_scalars, self.sections
        temporaries = [t for t in _targets(self._elementwise) if t not in ("p", "g", *self.state_names)]
        signs = [str(state.non_negative).lower() for state in self.states] + ["false"] * (4 - len(self.states))
        values = [f"V& {name} = s[{i}]" for i, name in enumerate(self.state_names)]
        values += [f"V& {name} = t[{i}]" for i, name in enumerate(temporaries)]
        values += [f"const float {name} = c.{name}" for name in scalars]
        scales = [f"const float {name}_scale = scale[{i}]" for i, name in enumerate(self.state_names)]
        hyper = [f"const double {name} = hyper[{i}]" for i, name in enumerate(self.hyper)]
        hyper += [f"double {line}" for line in sections["scalars"].splitlines()]
        late = [f"double {name} = 0" for name in _targets(sections["norms"])]
        norms = [f"const double {name}_norm = sqrt(square_sums[{i}])" for i, name in enumerate(self.norms)]
        norms += sections["norms"].splitlines()
        results = [f"c.{name} = (float){name}" for name in scalars]
        named = [
            f"n[{i}] = {'p' if name == 'p' else f't[{temporaries.index(name)}]'}" for i, name in enumerate(self.norms)
        ]
        divisors = re.findall(r"over_root\(.*, (\w+), (\w+)\)", self._elementwise)
        allowed = " && ".join(["true", *(f"Roots::allows(c.{c}, c.{eps})" for c, eps in divisors)])
        return f"""// generated from the rule {self.name}
constexpr int RULE_STATES = {len(self.states)}, RULE_HYPER = {len(self.hyper)}, RULE_TEMPORARIES = {len(temporaries)};
#define RULE_NORMS {len(self.norms)}
constexpr bool RULE_NON_NEGATIVE[4] = {{{", ".join(signs)}}};
struct Scalars {{ {" ".join(f"float {name};" for name in scalars)} }};
LB_FN Scalars rule_scalars(const double* hyper, double step, const double* square_sums) {{
{_statements([*hyper, *late])}    if (square_sums) {{
{_statements(norms)}    }}
    Scalars c;
{_statements(results)}    return c;
}}
template <class V, class Roots>
LB_FN void rule_direction(const Scalars& c, V& p, V& g, V* s, const float* scale, V* t, Roots& roots) {{
{_statements([*values, *scales, *_for_shims(sections["direction"])])}}}
template <class V, class Roots>
LB_FN void rule_finish(const Scalars& c, V& p, V& g, V* s, V* t, Roots& roots) {{
{_statements([*values, *_for_shims(sections["finish"])])}}}
template <class Roots> LB_FN bool rule_allows(const Scalars& c) {{ return {allowed}; }}
template <class V> LB_FN void rule_norm_values(V& p, V* t, V* n) {{
{_statements(named)}}}
"""


def _targets(text: str) -> list[str]:
    """The names that a text assigns, in order, once each."""
    targets = [t for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Assign) for t in n.targets]
    return list(dict.fromkeys(t.id for t in targets if isinstance(t, ast.Name)))


def _names(text: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def _for_shims(text: str) -> list[str]:
    """Lines for the shims, where ``maximum`` is the processor's, which drops a NaN."""
    return text.replace("maximum(", "maximum_or_nan(").replace("over_root(", "roots.over(").splitlines()


def _statements(lines: Iterable[str]) -> str:
    return "".join(f"    {line};\n" for line in lines)


def power(x: float, n: float) -> float:
    """``x ** n`` for an integer n >= 0, by squaring: the same roundings in Python, C++ and CUDA, unlike ``pow``. NaN
    for a negative n or NaN."""
    if not n >= 0:
        return np.float64(np.nan)
    result, remaining = np.float64(1.0), int(min(n, 2.0**62))
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
    ``exp``. Beyond 750 it is infinite, below -750 zero."""
    x = np.float64(750.0 if x > 750 else -750.0 if x < -750 else x)
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
    "sqrt": np.sqrt,
    "where": _where,
    "ratio": ratio,
}


def _sqrt(x: Tensor) -> Tensor:
    # Correctly rounded, by way of double: torch.sqrt of float32 on the CPU may be MKL's, which is not.
    return x.double().sqrt().float()


def over_root(f: Tensor, a: Tensor, x: Tensor, c: Tensor, eps: Tensor) -> Tensor:
    """``f * a / (sqrt(x) * c + eps)``, each operation rounded."""
    return f * a / (_sqrt(x) * c + eps)


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


def _maximum(a: Tensor, b: Tensor) -> Tensor:
    # torch.maximum, but for zeros of different signs, where that has no rule
    return torch.where(a.isnan() | (a > b), a, b)


_TENSOR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fused": fused,
    "over_root": over_root,
    "sign": torch.sign,
    "maximum": _maximum,
    "where": torch.where,
}
