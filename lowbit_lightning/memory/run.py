"""``Run``: what a plan is made for. Each of its options is declared here and nowhere else: ``memory.plan`` takes it as
a keyword, ``lowbit plan`` as a flag, errors and tables name it, and the planner reads it as an attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.memory.batch import parse_batch
from lowbit_lightning.memory.states import Kind
from lowbit_lightning.memory.step import Step
from lowbit_lightning.optim.options import parse_bytes
from lowbit_lightning.sharding import Policy, mesh_shape

Strategy = Literal["single", "ddp", "sharded"]
Precision = Literal["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "int8-mixed"]

_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "int8-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, type and default.

    Attributes:
        help: one line, for ``lowbit plan --help``.
        allowed: the values it may have; empty: any.
        least: a whole number of at least this.
        refused: says what is wrong with this value in a run; None: nothing is wrong.
        words: the values by their words on the command line. parse: makes a value of any other word there.
        flag: the name on the command line; None: the option's own, "": it has none. metavar: for its value.
        passed: given to the optimizer as it is, unless it is None.
        always: named in every table, not only where it is not the default.
    """

    help: str
    allowed: tuple[Any, ...] = ()
    least: int | None = None
    refused: Callable[[Run], str | None] | None = None
    words: Mapping[str, Any] | None = None
    parse: Callable[[str], Any] | None = None
    flag: str | None = None
    metavar: str | None = None
    passed: bool = False
    always: bool = False

    def check(self, name: str, value: Any) -> None:
        if self.allowed and not any(type(value) is type(one) and value == one for one in self.allowed):
            raise ValueError(f"{name} must be one of {self.allowed}, got {value!r}")
        if self.least is not None and (not isinstance(value, int) or isinstance(value, bool) or value < self.least):
            raise ValueError(f"{name} must be a whole number of at least {self.least}, got {value!r}")


def option(default: Any, help: str, **known: Any) -> Any:
    """A field of ``Run``; the arguments of ``Option``."""
    made = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**made, metadata={"option": Option(help, **known)})


def option_of(declared: Field) -> Option:
    return declared.metadata["option"]


def default_of(declared: Field) -> Any:
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def _only_sharded(run: Run) -> str | None:
    return None if run.sharded else f"needs strategy='sharded', got {run.strategy!r}"


def _rank_count(run: Run) -> str | None:
    alone = run.strategy == "single" and run.world_size > 1
    return "needs strategy='ddp' or 'sharded', got 'single'" if alone else None


def _replica_count(run: Run) -> str | None:
    divides = run.world_size % run.replicas == 0
    return _only_sharded(run) if divides else f"must divide world_size, {run.world_size}"


def _near_pages(run: Run) -> str | None:
    return None if run.paged else "needs paged=True or 'disk'"


def _released(run: Run) -> str | None:
    if run.strategy == "ddp":
        return "needs strategy='single' or 'sharded': DDP averages gradients after the backward"
    return None if run.accumulate == 1 else f"needs accumulate=1, got {run.accumulate}: gradients that add up must stay"


def _int8_layers(run: Run) -> str | None:
    return None if run.precision == "int8-mixed" else f"needs precision='int8-mixed', got {run.precision!r}"


@dataclass(frozen=True, eq=False)
class Run:
    """A training run. Every field has a default. An option that is invalid, or would have no effect, raises an error.

    Attributes:
        world_size: ranks. strategy: "single", "ddp", or "sharded" (``strategy="lowbit_sharded"``: FSDP2); None:
            "single" on one rank, "sharded" on more.
        precision: Lightning's string. "32-true" leaves the parameters in their own dtypes, as Lightning does.
        optimizer: the name of one of ``lowbit_lightning.optim``, with ``bits``; a class; or an instance over the
            model's parameters, which has its own settings. Under "sharded" an optimizer of torch.optim becomes its
            twin, with states of ``bits``, as in the strategy. ``bits=None``: names are torch.optim's, nothing is
            converted.
        min_size, block_size, master: arguments of the optimizer. options: any other of its arguments, such as
            ``momentum``.
        batch: for activations: a tensor, or a tuple or dict of them; only shapes and dtypes matter.
        step: ``step(model, batch) -> loss``. None: the model's own loss (``memory.loss``).
        accumulate: micro-batches in an optimizer step; ``batch`` is one of them.
        reshard_after_forward, replicas, policy, all_gather: as for ``strategies.ShardedStrategy``.
        release_gradients: as ``optim.release_gradients`` does it.
        activation_checkpointing: the repeated blocks are recomputed in the backward.
        int8: arguments of ``convert.swap_linears``.
        margin: a share of the total, for memory that the allocator keeps beside the tensors; ``Plan.fits`` adds it.
        paged, resident: paging of the optimizer's states, as for the optimizers of this package (an instance has its
            own).

    Raises:
        ValueError: for an option that is out of range or has no effect beside the others; the error names it.
    """

    world_size: int = option(1, "number of ranks", least=1, metavar="N", refused=_rank_count, always=True)
    strategy: Strategy | None = option(
        None,
        "default: single on one rank, sharded on more",
        allowed=("single", "ddp", "sharded"),
        always=True,
    )
    precision: Precision = option("32-true", "of Lightning", allowed=("32-true", *_TRUE, *_AUTOCAST), always=True)
    optimizer: Kind = option("AdamW", "of lowbit_lightning.optim, with --bits none of torch.optim", always=True)
    bits: int | None = option(
        8, "of optimizer states", allowed=(8, 32, None), words={"8": 8, "32": 32, "none": None}, always=True
    )
    min_size: int | None = option(
        None, "parameters with fewer elements stay in 32 bits", least=0, metavar="N", passed=True
    )
    block_size: int | None = option(None, "elements that share a scale", least=0, metavar="N", passed=True)
    master: Literal["bf16+8"] | None = option(
        None, "a 24-bit master copy of bfloat16 parameters", words={"bf16+8": "bf16+8"}, passed=True
    )
    options: Mapping[str, Any] = option(dict, "of the optimizer", flag="")
    paged: bool | Literal["disk"] = option(
        False,
        "where optimizer states lie that are paged",
        allowed=(False, True, "disk"),
        words={"host": True, "disk": "disk"},
    )
    resident: int | str = option(0, "of paged states that stay near, as 512MiB", metavar="SIZE", refused=_near_pages)
    reshard_after_forward: bool = option(
        True,
        "parameters stay gathered from forward to backward",
        allowed=(True, False),
        flag="zero2",
        refused=_only_sharded,
    )
    replicas: int = option(1, "groups of ranks with a copy each (HSDP)", least=1, metavar="N", refused=_replica_count)
    policy: Policy | None = option(None, "which modules are gathered as one", flag="", refused=_only_sharded)
    all_gather: Literal["high", "int8"] = option(
        "high", "how sharded parameters travel", allowed=("high", "int8"), refused=_only_sharded
    )
    batch: Any = option(
        None, "the model's inputs, for activations: 8x1024:int64,8x1024:int64", parse=parse_batch, metavar="SHAPES"
    )
    step: Step | None = option(None, "step(model, batch) -> loss", flag="")
    accumulate: int = option(1, "micro-batches in a step", least=1, metavar="N")
    release_gradients: bool = option(
        False,
        "parameters are updated in the backward, and each gradient is freed at once",
        allowed=(True, False),
        refused=_released,
    )
    activation_checkpointing: bool = option(False, "of the repeated blocks", allowed=(True, False))
    int8: Mapping[str, Any] = option(dict, "arguments of swap_linears", flag="", refused=_int8_layers)
    margin: float = option(
        0.12,
        "of the total, for what the allocator keeps beside the tensors",
        parse=float,
        metavar="SHARE",
        refused=lambda run: None if 0 <= run.margin <= 1 else "must be between 0 and 1",
    )

    def __post_init__(self) -> None:
        if self.strategy is None and self.world_size != 1:
            object.__setattr__(self, "strategy", "sharded")
        elif self.strategy is None:
            object.__setattr__(self, "strategy", "single")
        changed = self._changed()
        for name, declared in changed.items():
            declared.check(name, getattr(self, name))
        parse_bytes(self.resident)
        for name, declared in changed.items():
            wrong = declared.refused(self) if declared.refused else None
            if wrong is not None:
                raise ValueError(f"{name}={getattr(self, name)!r} {wrong}")

    @classmethod
    def of(cls, **given: Any) -> Run:
        """A run from keywords. A keyword that is not an option of a run goes to its optimizer."""
        return cls(**_sorted(cls, given, {}))

    def but(self, **changes: Any) -> Run:
        """This run with other options; options of the optimizer are added to those that it has."""
        return replace(self, **_sorted(type(self), changes, self.options))

    def _changed(self) -> dict[str, Option]:
        """The options whose values are not the defaults."""
        pairs = ((declared, getattr(self, declared.name)) for declared in fields(self))
        return {
            declared.name: option_of(declared)
            for declared, value in pairs
            if not (value is default_of(declared) or (type(value) in _PLAIN and value == default_of(declared)))
        }

    # -- what follows from them --------------------------------------------------------------------------------------

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Arguments of the optimizer, without those of paging."""
        passed = [declared.name for declared in fields(self) if option_of(declared).passed]
        return {**{name: getattr(self, name) for name in passed if getattr(self, name) is not None}, **self.options}

    @property
    def paging(self) -> dict[str, Any]:
        """The optimizer's options of paging; empty if nothing is paged."""
        return {"paged": self.paged, "resident": self.resident} if self.paged else {}

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """A parameter's or buffer's dtype in the run."""
        dtype = _TRUE.get(self.precision)
        return dtype if dtype and tensor.is_floating_point() else tensor.dtype

    @property
    def true_dtype(self) -> torch.dtype | None:
        """The dtype to which the model is cast, or None."""
        return _TRUE.get(self.precision)

    @property
    def autocast(self) -> torch.dtype | None:
        return _AUTOCAST.get(self.precision)

    @property
    def sharded(self) -> bool:
        return self.strategy == "sharded"

    @property
    def ranks(self) -> int:
        """The number of ranks that share one copy of a parameter."""
        return mesh_shape(self.world_size, self.replicas)[1] if self.sharded else 1

    def shown(self) -> dict[str, Any]:
        """For a table: the options that are always named and those that differ from the default, in words and
        numbers."""
        changed, found = self._changed(), dict[str, Any]()
        for declared in fields(self):
            name, value = declared.name, getattr(self, declared.name)
            if name in changed or option_of(declared).always:
                found[name] = value
        kind = self.optimizer if isinstance(self.optimizer, (str, type)) else type(self.optimizer)
        found["optimizer"] = kind if isinstance(kind, str) else kind.__name__
        if isinstance(self.optimizer, Optimizer):
            del found["bits"]
        for name in ("batch", "step", "policy"):
            found.pop(name, None)
        return {**found, **found.pop("options", {})}


def _sorted(cls: type[Run], given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords for ``cls``: those that it does not know go to its ``options``."""
    known, own = {declared.name for declared in fields(cls)}, {**options, **given.get("options", {})}
    own |= {name: value for name, value in given.items() if name not in known}
    return {**{name: value for name, value in given.items() if name in known}, "options": own}


_PLAIN = (bool, int, float, str, type(None), dict)
