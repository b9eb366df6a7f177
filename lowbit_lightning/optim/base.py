"""What all optimizers share: everything but the mathematics.

``LowBitOptimizer`` creates, converts, saves and loads states, and hands all parameters of a group to one fused step.
An optimizer is a rule in ``kernels/rules`` and a short class in ``family.py`` that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

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
    parse_bytes,
    wants_master,
    warn_of_inert,
)
from lowbit_lightning.optim.paging import Pagers, check_pages, inherited_settings, to_device
from lowbit_lightning.optim.plan import FORM, Plan, Work, collect_work, hyperparameters, make_plan
from lowbit_lightning.state import blocks, shards
from lowbit_lightning.state.form import MASTER, Form, Paging, StateFormat, codes_name, fits_grid, scales_name
from lowbit_lightning.state.pages import Entries, PageStatistics, raw


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
        check_group(merged, self._rule_of(merged))
        super().add_param_group({**inherited_settings(self.param_groups, merged), **param_group})
        group = self.param_groups[-1]
        try:
            check_dtypes(group)
            check_pages(self, self.param_groups)
        except (TypeError, ValueError, OSError, RuntimeError):
            self.param_groups.pop()
            raise
        group["state_format"] = StateFormat.of(self._rule_of(group), group["block_size"]).to_dict()
        warn_of_inert(group, stacklevel=3)

    def _adopted(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of another optimizer, with all that this one wants in it, checked."""
        adopted = {**group, "state_format": StateFormat.of(self._rule_of(group), group["block_size"]).to_dict()}
        check_group(adopted, self._rule_of(adopted))
        check_dtypes(adopted)
        return adopted

    def _rule_of(self, group: dict[str, Any]) -> rules.Rule:
        return rules.get(self._rule(group))

    def form(
        self, group: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, *, keeps_grid: bool = True
    ) -> Form:
        """How the states of a parameter of ``group`` are kept.

        ``shape``: of all of it, not of a rank's part. ``keeps_grid``: whether it is cut between blocks, if at all; see
        ``shards.keeps_grid``.
        """
        rule = self._rule_of(group)
        low = group["bits"] == 8 and keeps_grid and fits_grid(shape, group["min_size"])
        paging = Paging(group["paged"], parse_bytes(group["resident"]), group["page_dir"])
        return Form(
            rule,
            tuple(8 if low and not state.slow else 32 for state in rule.states),
            tuple(self._initial(state, group) for state in rule.states),
            group["block_size"],
            master=group["master"] is not None and dtype == torch.bfloat16,
            paging=paging if group["paged"] else None,
        )

    def _bits(self, p: Tensor, group: dict[str, Any], state: rules.State) -> int:
        """The bits that p's state is to have."""
        form = self.form(group, p.shape, p.dtype, keeps_grid=shards.keeps_grid(p))
        return form.bits[form.rule.states.index(state)]

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
        plans = self._plans_of([(partitions.key_of(part.params, number), part) for number, part in enumerate(work)])
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
        self._paging.end_step(self)
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
        (plan,) = self._plans_of([(("parameter", ordinal), work)])
        self._step_group(work, plan, Factors())
        self._paging.record_order(p)

    def _step_group(self, work: Work, plan: Plan, asked: Factors) -> None:
        rule, group = self._rule_of(work.group), work.group
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

    def forget_plans(self) -> None:
        """Let go of what is kept for the next step; after states were moved, their old memory is free then."""
        self.__dict__.pop("_plans", None)

    @property
    def _paging(self) -> Pagers:
        """Made when it is first needed: an optimizer may have been unpickled, or of another class before."""
        return self.__dict__.setdefault("_pages", Pagers())

    def page_statistics(self) -> PageStatistics | None:
        """What paging has done so far; None where nothing is paged. See ``state.pages.PageStatistics``."""
        return self._paging.statistics()

    def _plans_of(self, work: list[tuple[Any, Work]]) -> list[Plan]:
        before = dict(self._paging.pagers)
        plans = [self._plan(key, part) for key, part in work]
        if before != self._paging.pagers:  # a new pager holds the states of all groups: plans made before it are void
            plans = [self._plan(key, part) for key, part in work]
        return plans

    def _plan(self, key: Any, work: Work) -> Plan:
        group, rule = work.group, self._rule_of(work.group)
        form = (rule.name, *(group[k] for k in FORM))
        held = [value for p in work.params for value in raw(self.state[p]).values()]
        plans = self.__dict__.setdefault("_plans", {})
        plan = plans.pop(key, None)
        if plan is None or not plan.fits(form, work, held):
            self._keep_format(group, rule)
            entries = [self._entries(p, group, rule) for p in work.params]
            plan = make_plan(form, work, rule, entries, [self.state[p] for p in work.params])
        # A shard may be another tensor in the next step; of paged parameters the addresses are compared.
        if group["paged"] or not any(shards.is_sharded(p) for p in work.params):
            plans[key] = plan
        return plan

    def _entries(self, p: Tensor, group: dict[str, Any], rule: rules.Rule) -> dict[str, Any]:
        """``state[p]``, created, or converted to the bits that the group asks for, and paged or not as it asks."""
        place, held = self._paging.place(self, p, group), self.state[p]
        if isinstance(held, Entries):
            if place == (held.pager, held.number) and not partitions.is_partition(p):
                return held.raw
            stays = held.is_paged if place is not None else lambda _: False  # scales and counts follow their parameter
            held = {name: value if stays(name) else to_device(p, value) for name, value in held.named().items()}
        entries = self._formed(p, held, group, rule, paged=place is not None)
        moves = isinstance(self.state[p], Entries)
        self.state[p] = entries if place is None else Entries(p, entries, *place)  # type: ignore[assignment]
        if moves:
            self._paging.drop_unused(self)
        return raw(self.state[p])

    def _formed(
        self, p: Tensor, entries: dict[str, Any], group: dict[str, Any], rule: rules.Rule, paged: bool
    ) -> dict[str, Any]:
        """``entries`` in the form that the group asks for. New ones that are to be ``paged`` take no memory yet."""
        if partitions.is_partition(p):
            partitions.adopt_states(p, entries, rule, self.param_groups)
        if "step" not in entries:
            entries["step"] = torch.zeros((), dtype=torch.float32, device=shards.local(p).device)
        for state in rule.states:
            coded, bits = blocks.is_coded(entries, state.name), self._bits(p, group, state)
            if not coded and state.name not in entries:
                value = self._initial(state, group)
                entries.update(blocks.create(p, state, bits, group["block_size"], value, spread=paged))
            elif coded != (bits == 8):
                saved = StateFormat.parse(group["state_format"])
                _replace(entries, state.name, blocks.convert(p, state, entries, saved, bits, group["block_size"]))
        if not wants_master(p, group):
            entries.pop(MASTER, None)
        elif MASTER not in entries:
            entries[MASTER] = blocks.filled(p, 0, torch.int8, spread=paged)
        return entries

    def _keep_format(self, group: dict[str, Any], rule: rules.Rule) -> None:
        """Requantise all states of a group whose ``block_size`` was changed.

        Raises:
            ValueError: for scales that fit no block size; nothing has been changed then.
        """
        saved, wanted = StateFormat.parse(group["state_format"]), StateFormat.of(rule, group["block_size"])
        if partitions.are_partitions([group]) or saved.block_size != wanted.block_size:
            changes: list[tuple[Tensor, rules.State, int]] = []
            for p in group["params"]:  # of partitions, DeepSpeed may show some at a time: each scale tells its size
                entries = raw(self.state.get(p, {}))
                for state in (state for state in rule.states if blocks.is_coded(entries, state.name)):
                    held = blocks.block_size_of(p, entries, state.name, wanted.block_size)
                    if held != wanted.block_size:
                        changes.append((p, state, held))
            for p, state, held in changes:
                entries = self.state[p]
                named = entries.named() if isinstance(entries, Entries) else entries
                form = replace(saved, block_size=held)
                for name, value in blocks.convert(p, state, named, form, 8, wanted.block_size).items():
                    entries[name] = value
        group["state_format"] = wanted.to_dict()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self, *, bits: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """The states as they are; with ``bits=32`` decoded, in the form that the twin in torch.optim loads.

        Under DeepSpeed they are always decoded, on the host: its tools read float32."""
        if bits not in (32, None):
            raise ValueError(f"bits must be None (as the states are) or 32, got {bits!r}")
        flat = bits is None and partitions.are_partitions(self.param_groups)
        for group in self.param_groups if bits == 32 or flat else ():
            self._keep_format(group, self._rule_of(group))  # first: torch's method gives paged scales as they are now
        hook = self.register_state_dict_post_hook(_name_entries, prepend=True)
        try:
            saved = super().state_dict()
        finally:
            hook.remove()
        if bits is None and not flat:
            return saved
        state: dict[Any, Any] = {}
        for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=True):
            for key, p in zip(theirs["params"], ours["params"], strict=True):
                if key in saved["state"]:
                    place = torch.empty(p.shape, dtype=p.dtype) if flat else p
                    found, group = saved["state"][key], {**ours, "bits": 32}
                    state[key] = loading.converted(self, place, found, loading.format_of(ours), group)
            for name in OWN:
                theirs.pop(name, None)
        return {**saved, "state": state}

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
        loading.load(self, super().load_state_dict, state_dict)

    def _completed(self, entries: dict[str, Any]) -> dict[str, Any]:
        """Saved entries of a parameter, with what the twin in torch.optim leaves out; empty where there are none."""
        return entries


def _name_entries(_: Optimizer, saved: dict[str, Any]) -> None:
    """A checkpoint holds plain tensors and DTensors."""
    saved["state"] = {k: v.named() if isinstance(v, Entries) else v for k, v in saved["state"].items()}


def _replace(entries: dict[str, Tensor], name: str, new: dict[str, Tensor]) -> None:
    for old in (name, codes_name(name), scales_name(name)):
        entries.pop(old, None)
    entries.update(new)
