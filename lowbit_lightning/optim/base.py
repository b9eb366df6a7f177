"""What all optimizers share: everything but the mathematics.

``LowBitOptimizer`` creates, converts, saves and loads states, and hands all parameters of a group to one fused step.
An optimizer is a rule in ``kernels/rules`` and a short class in ``family.py`` that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.optim import loading, partitions
from lowbit_lightning.optim.factors import Factors, factors
from lowbit_lightning.optim.launches import Launch, join_norms
from lowbit_lightning.optim.options import (
    OWN,
    Options,
    check_dtypes,
    check_form,
    check_group,
    complete_options,
    inherited_settings,
    parse_bytes,
    warn_of_inert,
)
from lowbit_lightning.optim.plan import FORM, Plan, Work, collect_work, hyperparameters, make_plan
from lowbit_lightning.state import bitsandbytes, pagers, saved, shards
from lowbit_lightning.state.form import Form, Paging, StateFormat, fits_grid
from lowbit_lightning.state.pages import Entries, PageStatistics, raw
from lowbit_lightning.state.store import Made, Store

Formed = tuple[Tensor, Form]


class LowBitOptimizer(Optimizer):
    """Base of all optimizers here. Subclasses define ``_rule`` and their constructor.

    ``state[p]`` holds ``step`` (0-d float32) and, for every state of the rule, either ``NAME`` (float32) or
    ``NAME_codes`` (uint8) and ``NAME_scales`` (float32); DTensors where p is one. A group's ``state_format``
    describes the 8-bit ones in a checkpoint. Changing a group's ``bits`` converts its states at the next step.

    A ``torch.amp.GradScaler`` leaves unscaling and skipping to the step; ``clip_next_step`` adds clipping.

    Raises:
        ValueError, TypeError: for a hyperparameter or option out of range, naming it, before anything is changed.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler's protocol: it sets grad_scale and found_inf for a step
    releases_gradients = False  # whether ``release_gradients`` updates its parameters during backward
    _max_norm: float | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        super().__init__(params, {**defaults, **complete_options(options), "state_format": None})

    @classmethod
    def __subclasses__(cls) -> list[type]:  # type: ignore[override]
        """All but the namesakes of torch's: LightningCLI looks for a bare ``--optimizer=AdamW`` among the subclasses of
        ``torch.optim.Optimizer``, and refuses it where it finds two. Ours goes by ``lowbit_lightning.optim.AdamW``."""
        return [c for c in type.__subclasses__(cls) if not hasattr(torch.optim, c.__name__)]

    # -- what a subclass says ----------------------------------------------------------------------------------------

    def _rule(self, group: dict[str, Any]) -> str:
        """The name of the rule for a group."""
        raise NotImplementedError

    def _derived(self, group: dict[str, Any], bits: int) -> dict[str, float]:
        """Hyperparameters of the rule that are no keys of the group; ``bits`` of the parameters' states."""
        return {}

    def _initial(self, state: rules.State, group: dict[str, Any]) -> float:
        """What a state is before the first step: 0 or a positive number."""
        return 0.0

    # -- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its keys overrule the defaults. See ``torch.optim.Optimizer``."""
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
        group["state_format"] = StateFormat.of(self.rule_of(group), group["block_size"]).to_dict()
        warn_of_inert(group, stacklevel=3)

    def adopted(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of another optimizer, with all that this one wants in it, checked."""
        adopted = {**group, "state_format": StateFormat.of(self.rule_of(group), group["block_size"]).to_dict()}
        check_group(adopted, self.rule_of(adopted))
        check_dtypes(adopted)
        return adopted

    def check_pages(self, groups: Sequence[dict[str, Any]] | None = None, share: float | None = None) -> None:
        """Raise before training for groups (None: the optimizer's) that cannot be paged; see ``state.pagers.check``.

        ``share`` of what ZeRO will cut lies on this machine, if that is known.
        """
        pagers.check(
            (p, form, partitions.share_of_machine(p, share) if p.requires_grad or raw(self.state.get(p, {})) else 0.0)
            for p, form in self._forms(self.param_groups if groups is None else groups)
        )

    def rule_of(self, group: dict[str, Any]) -> rules.Rule:
        """The update rule of a group."""
        return rules.get(self._rule(group))

    def form(
        self,
        group: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        keeps_grid: bool = True,
        partition: bool = False,
    ) -> Form:
        """How the states of a parameter of ``group`` are kept.

        ``shape``: of all of it, not of a rank's part. ``keeps_grid``: whether it is cut between blocks, if at all; see
        ``shards.keeps_grid``. ``partition``: whether it is a flat partition of DeepSpeed's.
        """
        rule = self.rule_of(group)
        low = group["bits"] == 8 and keeps_grid and fits_grid(shape, group["min_size"])
        paging = Paging(group["paged"], parse_bytes(group["resident"]), group["page_dir"]) if group["paged"] else None
        return Form(
            rule,
            tuple(8 if low and not state.slow else 32 for state in rule.states),
            tuple(self._initial(state, group) for state in rule.states),
            group["block_size"],
            master=group["master"] is not None and dtype == torch.bfloat16,
            paging=paging,
            partition=partition,
        )

    def _forms(self, groups: Iterable[dict[str, Any]], params: Iterable[Tensor] | None = None) -> Iterator[Formed]:
        """The parameters of groups, or ``params`` of a single one, with their forms."""
        for group in groups:
            made: dict[tuple, Form] = {}
            for p in group["params"] if params is None else params:
                key = p.shape, p.dtype, shards.keeps_grid(p), partitions.is_partition(p)
                if key not in made:
                    made[key] = self.form(group, *key[:2], keeps_grid=key[2], partition=key[3])
                yield p, made[key]

    def _everyone(self) -> Iterator[Formed]:
        return self._forms(self.param_groups)

    @property
    def store(self) -> Store:
        """Of the states. Made when it is first needed: an optimizer may have been unpickled, or of another class."""
        store = self.__dict__.setdefault("_store", Store(self.state))
        store.state = self.state  # torch makes a new one when it loads
        return store

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work, ordinal = [], 0
        for group in self.param_groups:
            check_form(group)
            indices = [i for i, p in enumerate(group["params"]) if p.grad is not None]
            work.append(collect_work(group, [group["params"][i] for i in indices], [ordinal + i for i in indices]))
            ordinal += len(group["params"])
        plans = self._plans_of(work)
        max_norm, self._max_norm = self._max_norm, None
        asked = factors(
            [p for part in work for p in part.params],
            [grad for part in work for grad in part.grads],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            max_norm=max_norm,
            skip_nonfinite=any(part.group["skip_nonfinite"] for part in work if part.params),
        )
        for part, plan in zip(work, plans, strict=True):
            self._step_group(part, plan, asked)
        self.store.end_step(self._everyone)
        return loss

    def clip_next_step(self, max_norm: float | None) -> None:
        """Let the next step clip its gradients inside, as ``torch.nn.utils.clip_grad_norm_`` would before it.

        The norm is that of all gradients of this optimizer, of all ranks, unscaled where a GradScaler is at work;
        ``p.grad`` stays as it is. None takes it back.

        Raises:
            ValueError: for a ``max_norm`` that is not positive.
        """
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, or None for no clipping, got {max_norm}")
        self._max_norm = max_norm

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: dict[str, Any], ordinal: int) -> None:
        """Update one parameter of ``group``; ``ordinal`` is its place among all parameters.

        For ``release_gradients``.
        """
        check_form(group)
        work = collect_work(group, [p], [ordinal])
        (plan,) = self._plans_of([work])
        self._step_group(work, plan, Factors())
        self.store.record_order(p)

    def _step_group(self, work: Work, plan: Plan, asked: Factors) -> None:
        rule, group = self.rule_of(work.group), work.group
        for part in plan.parts:
            a = part.arguments
            a.lr, a.hyper = hyperparameters(rule, {**group, **self._derived(group, part.bits)}, a.device)
            a.unscale, a.clip, a.skip = asked.to(a.device)
            a.seed, a.maximize = group["seed"], group["maximize"]
            a.grads = [work.grads[i] for i in part.indices]
        for launch in plan.launches:
            launch.copy_step_counts()
        norms = self._norms(work, plan) if rule.norms else [None] * len(plan.parts)
        for launch in plan.launches:
            launch.prepare(plan.parts[launch.part].arguments, changes=True)
            kernels.optimizer_step(launch.arguments, launch.select_norms(norms[launch.part]))
            launch.arguments.forget_gradients()
        for part in plan.parts:
            part.arguments.forget_gradients()
        shards.mark_changed(work.params)

    def _norms(self, work: Work, plan: Plan) -> list[Tensor | None]:
        """For each part the norms that the rule wants, of all ranks."""
        found: list[list[tuple[Launch, list[Tensor]]]] = [[] for _ in plan.parts]
        for launch in plan.launches:
            launch.prepare(plan.parts[launch.part].arguments, changes=False)
            found[launch.part].append((launch, launch.square_sums()))
        return [
            shards.sum_over_shards([work.params[i] for i in part.indices], join_norms(sums, len(part.indices)))
            for part, sums in zip(plan.parts, found, strict=True)
        ]

    # -- plans -------------------------------------------------------------------------------------------------------

    @property
    def _plans(self) -> WeakKeyDictionary[Any, dict[Tensor, Plan]]:
        """The last plan of each parameter, as long as the store has the version that it was made for."""
        return self.__dict__.setdefault("_made", WeakKeyDictionary())

    def forget_plans(self) -> None:
        """Let go of what is kept for the next step: states that were moved without the store leave memory behind."""
        self._plans.clear()

    def _plans_of(self, work: list[Work]) -> list[Plan]:
        while True:
            version = self.store.version
            plans = [self._plan(part) for part in work]
            if self.store.version is version:  # or a new pager took over what earlier plans are for
                return plans

    def _plan(self, work: Work) -> Plan:
        group, rule = work.group, self.rule_of(work.group)
        settings = (rule.name, *(group[k] for k in FORM))
        known = self._plans.get(self.store.version, {})
        plan = known.get(work.params[0]) if work.params else None
        if plan is not None and plan.fits(settings, work, self.store.held(work.params)):
            return plan
        del plan
        for p in work.params:
            known.pop(p, None)
        partitions.check_rule(rule, self.param_groups)
        self._keep_format(group)
        given = [self.store.give(p, form, self._everyone) for p, form in self._forms([group], work.params)]
        plan = make_plan(settings, work, rule, given, self.store.held(work.params))
        # A shard may be another tensor in the next step; of paged parameters the addresses are compared.
        if group["paged"] or not any(shards.is_sharded(p) for p in work.params):
            self._plans.setdefault(self.store.version, {}).update(dict.fromkeys(work.params, plan))
        return plan

    def _keep_format(self, group: dict[str, Any]) -> None:
        """Requantise all states of a group whose ``block_size`` was changed.

        Raises:
            ValueError: for scales that fit no block size; nothing has been changed then.
        """
        wanted = StateFormat.of(self.rule_of(group), group["block_size"])
        # Of partitions, DeepSpeed may show some at a time: each scale tells its size.
        if partitions.are_partitions([group]) or group["state_format"]["block_size"] != wanted.block_size:
            self.store.requantise(self._forms([group]))
        group["state_format"] = wanted.to_dict()

    def page_statistics(self) -> PageStatistics | None:
        """What paging has done so far; None where nothing is paged. See ``state.pages.PageStatistics``."""
        return self.store.statistics()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self, *, bits: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """The states as they are; with ``bits=32`` decoded, in the form that the twin in torch.optim loads.

        Under DeepSpeed they are always decoded, on the host: its tools read float32."""
        if bits not in (32, None):
            raise ValueError(f"bits must be None (as the states are) or 32, got {bits!r}")
        flat = bits is None and partitions.are_partitions(self.param_groups)
        for group in self.param_groups if bits == 32 or flat else ():
            self._keep_format(group)  # first: torch's method gives paged scales as they are now
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
            for key, (p, form) in zip(theirs["params"], self._forms([{**ours, "bits": 32}]), strict=True):
                if key in found["state"]:
                    place = torch.empty(p.shape, dtype=p.dtype) if flat else p
                    state[key] = saved.read(place, (found["state"][key], coded), form)
            for name in OWN:
                theirs.pop(name, None)
        return {**found, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` of this or of the twin in torch.optim returned.

        States come back to the bit where their form is this optimizer's, and are converted (8 to 32 bits, 32 to 8,
        another block size) where it is not. Everything but ``bits``, ``min_size``, ``block_size`` and the settings of
        paging is taken from the checkpoint.

        Raises:
            ValueError: for an unknown format version, or states that do not fit.
            OSError, RuntimeError: for paged states without room beside those of before, which are kept until all new
                ones are there; ``optimizer.state.clear()`` gives them up beforehand.

        Nothing has been changed then.
        """
        made: dict[Tensor, Made] = {}

        def withhold_states(found: dict[str, Any]) -> dict[str, Any]:
            found = bitsandbytes.native_groups(found, self.defaults)
            pairs = zip(found["param_groups"], self.param_groups, strict=False)
            groups = [
                {**{k: ours[k] for k in self.defaults if k in ours}, **theirs, **{k: ours[k] for k in OWN}}
                for theirs, ours in pairs
            ]
            made.update(self._conversions(found, groups))
            return {**found, "state": {}, "param_groups": groups + found["param_groups"][len(groups) :]}

        def install() -> None:
            self._renew_store()
            for group in self.param_groups:  # the checkpoint may have chosen another rule
                group["state_format"] = StateFormat.of(self.rule_of(group), group["block_size"]).to_dict()
            self.store.load(made, self._everyone)

        if not self.state:  # cleared, perhaps to make room
            self._renew_store()
        loading.load(self, super().load_state_dict, state_dict, withhold_states, install)

    def _renew_store(self) -> None:
        """From here on states in their slabs, and whoever holds the old store, are all that keeps them alive."""
        self._store = self.store.renewed(self.state)

    def _conversions(self, found: dict[str, Any], groups: list[dict[str, Any]]) -> dict[Tensor, Made]:
        """How saved states become ours, each found to be possible; of parameters that are not paged, done."""
        made: dict[Tensor, Made] = {}
        for theirs, ours, group in zip(found["param_groups"], self.param_groups, groups, strict=False):
            coded = None if theirs.get("state_format") is None else StateFormat.parse(theirs["state_format"])
            for key, (p, form) in zip(theirs["params"], self._forms([group], ours["params"]), strict=False):
                if key in found["state"]:
                    entries = saved.check(p, (self._completed(found["state"][key]), coded), form)
                    made[p] = form, partial(saved.read, p, entries, form)
        return {
            p: (form, read if form.paging is not None else partial(dict, read())) for p, (form, read) in made.items()
        }

    def converted(self, groups: Iterable[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """The states of the twin in torch.optim, which are this optimizer's now, in the form that ``groups`` ask for.

        Raises:
            ValueError: for states that do not fit.
        """
        return {
            p: saved.read(p, (self._completed(self.state[p]), None), form)
            for p, form in self._forms(groups)
            if self.state.get(p)
        }

    def form_states(self) -> None:
        """Create all states, or bring them into their form, now; the next step would."""
        for p, form in self._everyone():
            self.store.give(p, form, self._everyone)

    def _completed(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Saved entries of a parameter, with what the twin in torch.optim leaves out; empty where there are none."""
        return entries


def _name_entries(_: Optimizer, saved: dict[str, Any]) -> None:
    """A checkpoint holds plain tensors and DTensors."""
    saved["state"] = {k: v.named() if isinstance(v, Entries) else v for k, v in saved["state"].items()}
