"""``Int8Experts``: the experts of a mixture of experts, whose products run in int8, all experts in one op.

What it computes
----------------
``top_k`` of E experts see each token. Each is a feed-forward network: ``down(act(gate x) * up x)``. The rows of all
(token, expert) pairs are sorted by expert, so each expert's are side by side; the two projections are then products of
groups of rows (``grouped_ops``), and every token's results are added up by the router's weights.

The int8 product of a group is the one that ``Int8Linear`` would compute from its rows: a scale for each token and for
each output of each expert in the forward; in the gradient by the weights, a scale for each channel of each expert.

Which modules have this form
----------------------------
``Experts``, and the experts of Transformers 5, whose models share one interface (``use_experts_implementation``): the
parameters ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of three dimensions, ``_apply_gate``, and attributes that
say how they lie. The model's own subclass of ``nn.Module`` is kept as a base class, with its gate and activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit_lightning.kernels.dispatch import is_transformed
from lowbit_lightning.layers.experts import LowBitTensor
from lowbit_lightning.layers.grouped_ops import grouped_linear
from lowbit_lightning.layers.int8 import FORMS, Int8Layer, Products, Projections, fewest_rows, in_compute_dtype
from lowbit_lightning.layers.seen import ExpertsSeen, Terms, is_noted

_TOLD = ("has_gate", "has_bias", "is_transposed")


class Experts(nn.Module):
    """The experts of a mixture of experts in plain torch: ``down(act(gate x) * up x)``, an expert at a time.

    Args:
        num_experts, hidden_dim, intermediate_dim: E, D and I.
        act_fn: the activation of the gate.
        device, dtype: of the parameters ``gate_up_proj [E, 2 I, D]`` and ``down_proj [E, D, I]``.

    ``forward(hidden_states [tokens, D], top_k_index [tokens, k], top_k_weights [tokens, k])`` gives ``[tokens, D]``:
    the sum of the results of each token's experts by their weights. An index below 0, or of E or more, is of no expert.

    Raises:
        ValueError: in ``forward``, for shapes that do not fit each other.
    """

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int,
        intermediate_dim: int,
        act_fn: Callable[[Tensor], Tensor] = nn.functional.silu,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        sizes = {"gate_up_proj": (2 * intermediate_dim, hidden_dim), "down_proj": (hidden_dim, intermediate_dim)}
        for name, (rows, length) in sizes.items():
            weight = torch.empty(num_experts, rows, length, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear`` does for each expert: uniform within 1 / sqrt(inputs)."""
        for weight in self.parameters(recurse=False):
            bound = 1 / math.sqrt(max(1, weight.shape[-1]))
            nn.init.uniform_(weight, -bound, bound)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def project(name: str, x: Tensor, offs: Tensor) -> Tensor:
            weight = getattr(self, name)
            if isinstance(weight, LowBitTensor):
                return weight.multiply_groups(x, offs)
            return linear_by_groups(x, weight, offs)

        return run_experts(self, project, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return ", ".join(f"{name} {list(weight.shape)}" for name, weight in self.named_parameters(recurse=False))


def linear_by_groups(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """``x[rows of e] @ weight[e].T`` in torch, of ``x [S, K]``, ``weight [E, N, K]`` and the groups' ends on the CPU;
    ``[S, N]``, with zeros in rows of no group."""
    *parts, rest = x.tensor_split(offs)
    ys = [nn.functional.linear(part, own) for part, own in zip(parts, weight, strict=True)]
    return torch.cat([*ys, ys[0].new_zeros(len(rest), ys[0].shape[1])])


def run_experts(
    experts: Any,
    project: Callable[[str, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The forward of ``Experts``, with ``project(name, rows, offs)`` for the products of the rows of all experts,
    sorted, with the parameter of that name."""
    sizes = len(top_k_index), top_k_weights.numel()
    if hidden_states.ndim != 2 or sizes != (len(hidden_states), top_k_index.numel()):
        shapes = f"{tuple(hidden_states.shape)}, {tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}"
        raise ValueError(f"hidden_states [tokens, D], top_k_index and top_k_weights [tokens, k] do not fit: {shapes}")
    top_k = top_k_index.shape[-1]
    ids = top_k_index.reshape(-1)
    expert_ids, order = torch.where(ids < 0, experts.num_experts, ids).sort(stable=True)
    numbers = torch.arange(experts.num_experts, dtype=expert_ids.dtype, device=expert_ids.device)
    offs = torch.searchsorted(expert_ids, numbers, right=True).cpu()  # once for all products
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    x = _sorted(hidden_states, order, back, top_k)
    y = project("gate_up_proj" if experts.has_gate else "up_proj", x, offs)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = project("down_proj", y, offs)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = _sorted(y, back, order).unflatten(0, (-1, top_k))
    return (y * top_k_weights.reshape(-1, top_k, 1)).sum(1).to(hidden_states.dtype)


def _sorted(x: Tensor, order: Tensor, back: Tensor, times: int = 1) -> Tensor:
    """Rows in another order, each ``times`` times: ``x[order // times]``; ``back`` is the inverse of ``order``."""
    if is_transformed() or torch.compiler.is_compiling():
        return x.index_select(0, order // times)
    return _Sorted.apply(x, order, back, times)  # type: ignore[no-untyped-call]


class _Sorted(torch.autograd.Function):
    """Its backward gathers. That of an index adds rows one by one, on a GPU in an order that is not fixed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor, times: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(back)
        ctx.times = times
        return x.index_select(0, order // times if times > 1 else order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (back,) = ctx.saved_tensors
        dx = dy.index_select(0, back)
        return (dx.unflatten(0, (-1, ctx.times)).sum(1) if ctx.times > 1 else dx), None, None, None


class Int8ExpertsForm(Projections):
    """What the int8 forms of all classes of experts have in common; the plain class is another base of each."""

    seen: ExpertsSeen | None = None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The three-dimensional parameters."""
        return tuple(getattr(self, name) for name in parameters_of(self))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The first of them."""
        return self.weights[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See ``Experts``. Evaluation runs in int8 from ``fewest_rows`` rows for an expert on, as of ``Int8Linear``.

        Raises:
            TypeError, ValueError: if the dtype, device or shape of the hidden states does not fit the weights.
        """
        experts: Any = self
        rows = top_k_index.numel()
        if not (self.training or torch.is_grad_enabled()) and rows < fewest_rows(self.weight) * experts.num_experts:
            return self.plain.forward(self, hidden_states, top_k_index, top_k_weights)
        x = in_compute_dtype(hidden_states, self.weight)
        if is_noted():
            self.seen = ExpertsSeen(rows, Terms.of(x, self.weight))

        def project(name: str, x: Tensor, offs: Tensor) -> Tensor:
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias") if experts.has_bias else None
            x = in_compute_dtype(x, weight)
            y = grouped_linear(x, weight, offs, bias, self.products, experts.is_transposed)
            for hook in self._projection_hooks.values():
                hook(self, x, weight, y, offs)
            return y

        return run_experts(self, project, x, top_k_index, top_k_weights).to(hidden_states.dtype)

    def __reduce__(self) -> Any:
        return _empty, (self.plain,), vars(self)


class Int8Experts(Int8ExpertsForm, Experts):
    """``Experts`` with their products in int8; arguments as there, and the fields of ``Products``.

    A training step costs three int8 products for each expert that has tokens, and each of its two matrices.
    """

    plain: ClassVar[type[nn.Module]] = Experts

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings = {name: kwargs.pop(name) for name in tuple(kwargs) if name in Products.__dataclass_fields__}
        Experts.__init__(self, *args, **kwargs)
        self.products = Products(**settings)


# -- which modules are experts ---------------------------------------------------------------------------------------


def is_experts(module: nn.Module) -> bool:
    """Whether a module is ``Experts``, has Transformers' interface of experts, or is in int8 one of these."""
    told = all(hasattr(module, name) for name in (*_TOLD, "has_post_expert_norm", "num_experts", "_apply_gate"))
    return told and all(isinstance(getattr(module, name, None), Tensor) for name in parameters_of(module))


def parameters_of(experts: Any) -> tuple[str, str]:
    """The names of its two three-dimensional parameters."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def int8_experts(plain: type[nn.Module]) -> type[Int8Layer]:
    """The int8 form of a class of experts: a subclass, so that ``isinstance`` stays true."""
    if plain in FORMS:
        return FORMS[plain]
    members = {"plain": plain, "__module__": __name__, "__doc__": f"``{plain.__name__}`` in int8."}
    return type(f"Int8{plain.__name__}", (Int8ExpertsForm, plain), members)


def _empty(plain: type[nn.Module]) -> nn.Module:
    """What pickle and ``deepcopy`` fill."""
    kind = int8_experts(plain)
    return kind.__new__(kind)
