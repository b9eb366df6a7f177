"""What all optimizers share: everything except the mathematics.

``LowBitOptimizer`` creates, converts, saves and loads states, and hands all parameters of a group to one fused step.
An optimizer is a rule in ``kernels/rules`` and a short class in ``family.py`` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.kernels import rules
from lowbit_lightning.optim import loading, partitions
from lowbit_lightning.optim.factors import Asked
from lowbit_lightning.optim.options import (
    OWN,
    Options,
    check_dtypes,
    check_form,
    check_group,
    complete_options,
    inherited_settings,
    warn_of_inert,
)
from lowbit_lightning.optim.plan import Plans
from lowbit_lightning.optim.settings import Settings, nothing_derived
from lowbit_lightning.state import bitsandbytes, pagers, saved
from lowbit_lightning.state.form import Form, StateFormat
from lowbit_lightning.state.pages import Entries, PageStatistics, raw
from lowbit_lightning.state.store import Made, Store

Formed = tuple[Tensor, Form]


class LowBitOptimizer(Optimizer):
    """Base class of all optimizers of this package. Subclasses define ``rule`` and their constructor.

    ``state[p]`` holds ``step`` (0-d float32) and, for every state of the rule, either ``NAME`` (float32) or
    ``NAME_codes`` (uint8) and ``NAME_scales`` (float32). They are DTensors if p is a DTensor. A group's
    ``state_format`` describes the 8-bit states in a checkpoint. Changing a group's ``bits`` converts its states at the
    next step.

    A ``torch.amp.GradScaler`` leaves unscaling and skipping to the step; ``clip_next_step`` adds clipping.

    Raises:
        ValueError, TypeError: for a hyperparameter or option out of range. The error names it; nothing is changed.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler's protocol: it sets grad_scale and found_inf for a step
    releases_gradients = False  # whether ``release_gradients`` updates its parameters during backward
    _max_norm: float | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        super().__init__(params, {**defaults, **complete_options(options), "state_format": None})

    @classmethod
    def __subclasses__(cls) -> list[type]:  # type: ignore[override]
        """The subclasses, without those that have the name of an optimizer in torch or of their own base class.

        LightningCLI looks for a bare ``--optimizer=AdamW`` among all subclasses of ``torch.optim.Optimizer``, and
        refuses the name if it finds two. This package's is called ``lowbit_lightning.optim.AdamW`` there."""
        found = [c for c in type.__subclasses__(cls) if not hasattr(torch.optim, c.__name__)]
        return [c for c in found if c.__name__ not in {base.__name__ for base in c.__mro__[1:]}]

    # -- what a subclass says ----------------------------------------------------------------------------------------

    rule: str
    """The name of the rule, or ``_rule`` gives one for each group."""

    def _rule(self, group: dict[str, Any]) -> str:
        return self.rule

    _derived = staticmethod(nothing_derived)
    """Gives hyperparameters of the rule that are not keys of the group, by the bits of the parameters' states."""

    # -- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its keys override the defaults. See ``torch.optim.Optimizer``."""
        merged = {**self.defaults, **param_group}
        check_group(merged, self.rule_of(merged))
        super().add_param_group({**inherited_settings(self.param_groups, merged), **param_group})
        group = self.param_groups[-1]
        try:
            check_dtypes(group)
            self.check_pages()
        except (TypeError, ValueError, OSError, RuntimeError):
            self.param_groups.pop()
            raise
        group["state_format"] = self.settings(group).format.to_dict()
        warn_of_inert(group, stacklevel=3)

    def check_pages(self, groups: Sequence[dict[str, Any]] | None = None, share: float | None = None) -> None:
        """Raise before training if groups (None: all of the optimizer's) cannot be paged; see ``state.pagers.check``.

        ``share`` is the share of ZeRO's partitions that lies on this machine, if it is known.
        """
        pagers.check(
            (p, form, partitions.share_of_machine(p, share) if p.requires_grad or raw(self.state.get(p, {})) else 0.0)
            for group in (self.param_groups if groups is None else groups)
            for p, form in self.settings(group).forms(group["params"])
        )

    def rule_of(self, group: dict[str, Any]) -> rules.Rule:
        return rules.get(self._rule(group))

    def settings(self, group: dict[str, Any]) -> Settings:
        """A group as a step sees it."""
        return Settings(group, self.rule_of(group), self._derived)

    def _everyone(self) -> Iterator[Formed]:
        """All parameters with their forms."""
        return chain.from_iterable(self.settings(group).forms(group["params"]) for group in self.param_groups)

    @property
    def _store(self) -> Store:
        """The store, made when it is first needed: an optimizer may have been unpickled, or have changed its class."""
        if "_states" not in self.__dict__:
            self._states = Store(self.state)
        self._states.state = self.state  # torch makes a new one when it loads
        return self._states

    @property
    def _plans(self) -> Plans:
        if "_made" not in self.__dict__:
            self._made = Plans()
        return self._made

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups, ordinal = [], 0
        for group in self.param_groups:
            check_form(group)
            params, grads = group["params"], [p.grad for p in group["params"]]
            some = [i for i, grad in enumerate(grads) if grad is not None]
            for part, chosen in self._parts(group, some) if some else ():
                columns = [params[i] for i in chosen], [grads[i] for i in chosen], [ordinal + i for i in chosen]
                groups.append((self.settings(part), *columns))
            ordinal += len(params)
        asked = Asked(getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self._max_norm)
        self._max_norm = None
        store = self._store
        self._plans.run(groups, store, self._everyone, asked)
        store.pagers.end_step(self.state, self._everyone)
        return loss

    def _parts(self, group: dict[str, Any], indices: list[int]) -> list[tuple[dict[str, Any], list[int]]]:
        """The parameters of a group, by their indices, that a step takes with one set of hyperparameters. A subclass
        may give some of them other values: a copy of the group with these."""
        return [(group, indices)]

    def clip_next_step(self, max_norm: float | None) -> None:
        """Let the next step clip its gradients internally, as ``torch.nn.utils.clip_grad_norm_`` would before it.

        The norm is taken over all gradients of this optimizer on all ranks, unscaled if a GradScaler is in use.
        ``p.grad`` does not change. None cancels the request.

        Raises:
            ValueError: for a ``max_norm`` that is not positive.
        """
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {max_norm}")
        self._max_norm = max_norm

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: dict[str, Any], ordinal: int) -> None:
        """Update one parameter of ``group``; ``ordinal`` is its index among all parameters.

        For ``release_gradients``.
        """
        check_form(group)
        store = self._store
        self._plans.run([(self.settings(group), [p], [p.grad], [ordinal])], store, self._everyone, Asked())
        store.pagers.record_order(p)

    def form_states(self) -> None:
        """Create all states, or convert them to their form, now instead of in the next step."""
        for p, form in self._everyone():
            self._store.give(p, form, self._everyone)

    def forget_plans(self) -> None:
        """Release what is kept for the next step. Otherwise states that were moved without the store would keep their
        old memory alive."""
        self.__dict__.pop("_made", None)

    def page_statistics(self) -> PageStatistics | None:
        """Statistics of paging so far; None if nothing is paged. See ``state.pages.PageStatistics``."""
        return self._store.pagers.statistics()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self, *, bits: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """The states as they are; with ``bits=32`` decoded, in the form that the twin in torch.optim loads.

        Under DeepSpeed the states are always decoded, on the host, because its tools read float32."""
        if bits not in (32, None):
            raise ValueError(f"bits must be None (as the states are) or 32, got {bits!r}")
        flat = bits is None and partitions.are_partitions([p for group in self.param_groups for p in group["params"]])
        for group in self.param_groups if bits == 32 or flat else ():
            self.settings(group).keep_format(self._store)  # first: torch's method gives paged scales as they are now
        hook = self.register_state_dict_post_hook(_name_entries, prepend=True)
        try:
            found = super().state_dict()
        finally:
            hook.remove()
        if bits is None and not flat:
            return found
        state: dict[Any, Any] = {}
        for theirs, ours in zip(found["param_groups"], self.param_groups, strict=True):
            coded = StateFormat.parse(ours["state_format"])
            forms = self.settings({**ours, "bits": 32}).forms(ours["params"])
            for key, (p, form) in zip(theirs["params"], forms, strict=True):
                if key in found["state"]:
                    place = torch.empty(p.shape, dtype=p.dtype) if flat else p
                    state[key] = saved.read(place, found["state"][key], coded, form)
            for name in OWN:
                theirs.pop(name, None)
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of ``state_dict()`` of this optimizer or of its twin in torch.optim.

        States are restored bit for bit if they have this optimizer's form. Otherwise they are converted (8 to 32 bits,
        32 to 8, another block size). Everything except ``bits``, ``min_size``, ``block_size`` and the settings of
        paging is taken from the checkpoint.

        Raises:
            ValueError: for an unknown format version, or states that do not fit.
            OSError, RuntimeError: if there is no room for new paged states beside the old ones, which are kept until
                all new ones are complete; ``optimizer.state.clear()`` frees the old ones first.

        If an error is raised, nothing has been changed.
        """
        made: dict[Tensor, Made] = {}

        def withhold_states(found: dict[str, Any]) -> dict[str, Any]:
            found = bitsandbytes.native_groups(found, self.defaults)
            pairs = zip(found["param_groups"], self.param_groups, strict=False)
            groups = [
                {**{k: ours[k] for k in self.defaults if k in ours}, **theirs, **{k: ours[k] for k in OWN}}
                for theirs, ours in pairs
            ]
            for theirs, ours, group in zip(found["param_groups"], self.param_groups, groups, strict=False):
                coded = None if theirs.get("state_format") is None else StateFormat.parse(theirs["state_format"])
                forms = self.settings(group).forms(ours["params"])
                for key, (p, form) in zip(theirs["params"], forms, strict=False):
                    if key in found["state"]:
                        entries = self._completed(found["state"][key])
                        made[p] = form, partial(saved.read, p, entries, coded, form)
            return {**found, "state": {}, "param_groups": groups + found["param_groups"][len(groups) :]}

        def install() -> None:
            self._renew_store()
            for group in self.param_groups:  # the checkpoint may have chosen another rule
                group["state_format"] = self.settings(group).format.to_dict()
            self._store.load(made, self._everyone)

        if not self.state:  # cleared, perhaps to make room
            self._renew_store()
        loading.load(self, super().load_state_dict, state_dict, withhold_states, install)

    def _renew_store(self) -> None:
        """Replace the store: old slabs then live only as long as somebody holds their tensors or the old store."""
        self._states = Store(self.state, self._store.pagers.renewed())

    def taken_over(self, groups: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """Groups of the twin in torch.optim, with all that this optimizer wants in them, and the states in their form.

        Raises:
            ValueError, TypeError, OSError: if groups or states do not fit; nothing is changed then.
        """
        adopted = [{**group, "state_format": self.settings(group).format.to_dict()} for group in groups]
        for group in adopted:
            check_group(group, self.rule_of(group))
            check_dtypes(group)
        self.check_pages(adopted)
        forms = (formed for group in adopted for formed in self.settings(group).forms(group["params"]))
        return adopted, {
            p: saved.read(p, self._completed(self.state[p]), None, form) for p, form in forms if self.state.get(p)
        }

    def _completed(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Saved entries of a parameter, with those that the twin in torch.optim leaves out; empty if nothing was
        saved."""
        return entries


def _name_entries(_: Optimizer, saved: dict[str, Any]) -> None:
    """A checkpoint holds plain tensors and DTensors."""
    saved["state"] = {k: v.named() if isinstance(v, Entries) else v for k, v in saved["state"].items()}
