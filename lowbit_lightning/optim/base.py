"""What all optimizers share: everything but the mathematics.

``LowBitOptimizer`` creates, converts, saves and loads states, and hands all parameters of a group to one fused step.
An optimizer is a rule in ``kernels/rules`` and a short class in ``family.py`` that names it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.arguments import FLOATS
from lowbit_lightning.kernels.formats import DEFAULT_BLOCK_SIZE, check_block_size
from lowbit_lightning.state import bitsandbytes, blocks, shards
from lowbit_lightning.state.blocks import StateFormat

MASTER = "master_remainder"
"""The state that holds the lower eight bits of a 24-bit master copy."""
_OWN = ("bits", "min_size", "block_size", "state_format")
"""Group keys that say how *this* optimizer keeps its states: a checkpoint does not overrule them."""


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes, for all parameters or as keys of a param group.

    ``bits`` (8): 8, or 32 for float32 states. ``min_size`` (4096): parameters with fewer elements, or rows shorter
    than 64, keep 32-bit states; a row is everything behind dimension 0. ``block_size`` (256): elements that share a
    scale. ``maximize`` (False). ``stochastic_rounding`` (False): round bfloat16 parameters up or down at random,
    without bias, keyed by ``seed`` (0). ``master`` (None): ``"bf16+8"`` keeps the next eight bits of bfloat16
    parameters in an int8 state, ``master_remainder``: updates as on a 24-bit master copy, at three bytes.
    ``skip_nonfinite`` (False): skip a whole step, on the device, when any gradient is not finite.

    ``foreach``, ``fused``, ``capturable`` are accepted for torch's sake: every step is one fused call with its step
    counts on the device. ``differentiable`` must be False.
    """

    bits: int
    min_size: int
    block_size: int
    maximize: bool
    stochastic_rounding: bool
    seed: int
    master: str | None
    skip_nonfinite: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


_DEFAULTS: dict[str, Any] = {
    "bits": 8,
    "min_size": 4096,
    "block_size": DEFAULT_BLOCK_SIZE,
    "maximize": False,
    "stochastic_rounding": False,
    "seed": 0,
    "master": None,
    "skip_nonfinite": False,
}
_TORCH_ONLY = ("foreach", "fused", "capturable", "differentiable")


def complete_options(options: Options) -> dict[str, Any]:
    """The options with their defaults, without those that only torch knows. Raises for what is not to be had."""
    unknown = set(options) - set(_DEFAULTS) - set(_TORCH_ONLY)
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known: {sorted(_DEFAULTS)}")
    if options.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the fused step has no gradient; use torch.optim")
    return {**_DEFAULTS, **{k: v for k, v in options.items() if k in _DEFAULTS}}


class _Work(NamedTuple):
    """A parameter that a step is to change."""

    ordinal: int
    p: Tensor
    grad: Tensor
    """This rank's part."""


class LowBitOptimizer(Optimizer):
    """Base of all optimizers here. Subclasses define ``_rule`` and their constructor.

    ``state[p]`` holds ``step`` (0-d float32) and, for every state of the rule, either ``NAME`` (float32) or
    ``NAME_codes`` (uint8) and ``NAME_scales`` (float32); DTensors where p is one. A group's ``state_format``
    describes the 8-bit ones in a checkpoint. Changing a group's ``bits`` converts its states at the next step.

    Raises:
        ValueError, TypeError: for a hyperparameter or option out of range, naming it, before anything is changed.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], options: Options) -> None:
        super().__init__(params, {**defaults, **complete_options(options), "state_format": None})

    # -- what a subclass says ----------------------------------------------------------------------------------------

    def _rule(self, group: dict[str, Any]) -> str:
        """The name of the rule for a group."""
        raise NotImplementedError

    def _derived(self, group: dict[str, Any]) -> dict[str, float]:
        """Hyperparameters of the rule that are no keys of the group."""
        return {}

    def _initial(self, state: rules.State, group: dict[str, Any]) -> float:
        """What a state is before the first step: 0 or a positive number."""
        return 0.0

    # -- groups ------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its keys overrule the defaults. See ``torch.optim.Optimizer``."""
        merged = {**self.defaults, **param_group}
        _check_group(merged, self._rule_of(merged))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_dtypes(group)
        except TypeError:
            self.param_groups.pop()
            raise
        group["state_format"] = StateFormat.of(self._rule_of(group), group["block_size"]).to_dict()
        for name in ("stochastic_rounding", "master"):
            if group[name] and not any(p.dtype == torch.bfloat16 for p in group["params"]):
                warnings.warn(f"{name} has no effect: no parameter of the group is bfloat16", stacklevel=3)

    def _adopted(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group of another optimizer, with all that this one wants in it, checked."""
        adopted = {**group, "state_format": StateFormat.of(self._rule_of(group), group["block_size"]).to_dict()}
        _check_group(adopted, self._rule_of(adopted))
        _check_dtypes(adopted)
        return adopted

    def _rule_of(self, group: dict[str, Any]) -> rules.Rule:
        return rules.get(self._rule(group))

    def _bits(self, p: Tensor, group: dict[str, Any]) -> int:
        """The bits that p's states are to have."""
        fits = group["bits"] == 8 and blocks.fits_grid(p.shape, group["min_size"]) and shards.keeps_grid(p)
        return 8 if fits else 32

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient. ``closure`` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ordinal = 0
        work = []
        for group in self.param_groups:
            _check_form(group)
            chosen = [
                _Work(ordinal + i, p, _local_grad(p)) for i, p in enumerate(group["params"]) if p.grad is not None
            ]
            ordinal += len(group["params"])
            work.append((group, chosen))
        skip = self._skip_flag(work)
        for group, chosen in work:
            for device, master in dict.fromkeys((w.p.device, _wants_master(w.p, group)) for w in chosen):
                alike = [w for w in chosen if (w.p.device, _wants_master(w.p, group)) == (device, master)]
                self._step_group(group, alike, device, skip)
        return loss

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: dict[str, Any], ordinal: int) -> None:
        """Update one parameter of ``group``; ``ordinal`` is its place among all parameters. For
        ``release_gradients``."""
        _check_form(group)
        self._step_group(group, [_Work(ordinal, p, _local_grad(p))], p.device, None)

    def _step_group(
        self, group: dict[str, Any], chosen: list[_Work], device: torch.device, skip: Tensor | None
    ) -> None:
        rule = self._rule_of(group)
        self._keep_format(group, rule)
        entries = [self._entries(w.p, group, rule) for w in chosen]
        states, scales = [], []
        for state in rule.states:
            coded = [blocks.is_coded(e, state.name) for e in entries]
            names = [blocks.codes_name(state.name) if c else state.name for c in coded]
            states.append([shards.local(e[name]) for e, name in zip(entries, names, strict=True)])
            pairs = zip(entries, coded, strict=True)
            scales.append([shards.local(e[blocks.scales_name(state.name)]) if c else e["step"] for e, c in pairs])
        lr, hyper = _hyper(rule, {**group, **self._derived(group)}, device)
        arguments = kernels.StepArguments(
            rule=rule.name,
            params=[shards.local(w.p) for w in chosen],
            grads=[w.grad for w in chosen],
            steps=[e["step"] for e in entries],
            states=states,
            scales=scales,
            hyper=hyper,
            block_size=group["block_size"],
            lr=lr,
            skip=None if skip is None else skip.to(device),
            seed=group["seed"],
            ordinals=[w.ordinal for w in chosen],
            offsets=[shards.first_index(w.p) for w in chosen],
            maximize=group["maximize"],
            stochastic_rounding=group["stochastic_rounding"],
            remainders=[shards.local(e[MASTER]) for e in entries if MASTER in e],
        )
        norms = None
        if rule.norms:
            norms = shards.sum_over_shards([w.p for w in chosen], kernels.optimizer_norms(arguments))
        kernels.optimizer_step(arguments, norms)
        shards.mark_changed([w.p for w in chosen])

    def _entries(self, p: Tensor, group: dict[str, Any], rule: rules.Rule) -> dict[str, Tensor]:
        """``state[p]``, created, or converted to the bits that the group asks for."""
        entries = self.state[p]
        bits = self._bits(p, group)
        if "step" not in entries:
            entries["step"] = torch.zeros((), dtype=torch.float32, device=shards.local(p).device)
        for state in rule.states:
            coded = blocks.is_coded(entries, state.name)
            if not coded and state.name not in entries:
                entries.update(blocks.create(p, state, bits, group["block_size"], self._initial(state, group)))
            elif coded != (bits == 8):
                saved = StateFormat.parse(group["state_format"])
                _replace(entries, state.name, blocks.convert(p, state, entries, saved, bits, group["block_size"]))
        if not _wants_master(p, group):
            entries.pop(MASTER, None)
        elif MASTER not in entries:
            entries[MASTER] = shards.like(p, torch.zeros_like(shards.local(p), dtype=torch.int8), p.shape)
        return entries

    def _keep_format(self, group: dict[str, Any], rule: rules.Rule) -> None:
        """Requantise all states of a group whose ``block_size`` was changed."""
        saved, wanted = StateFormat.parse(group["state_format"]), StateFormat.of(rule, group["block_size"])
        if saved.block_size != wanted.block_size:
            for p in group["params"]:
                for state in rule.states:
                    if blocks.is_coded(self.state.get(p, {}), state.name):
                        new = blocks.convert(p, state, self.state[p], saved, 8, wanted.block_size)
                        _replace(self.state[p], state.name, new)
        group["state_format"] = wanted.to_dict()

    def _skip_flag(self, work: list[tuple[dict[str, Any], list[_Work]]]) -> Tensor | None:
        """One float on a device: 1 if any gradient is not finite. None where no group asks for it."""
        chosen = [w for _, in_group in work for w in in_group]
        if not chosen or not any(group["skip_nonfinite"] for group, _ in work):
            return None
        flag = torch.zeros((), dtype=torch.float32, device=chosen[0].p.device)
        grads = [w.grad for w in chosen if w.grad.numel()]
        if grads:  # a rank may hold no rows of anything, and still takes part in what follows
            norms = torch._foreach_norm(grads, float("inf"))
            largest = torch.stack([norm.to(flag) for norm in norms])
            flag = 1.0 - torch.isfinite(largest).all().float()
        return shards.any_rank([w.p for w in chosen], flag)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self, *, bits: int | None = None) -> dict[str, Any]:  # type: ignore[override]
        """The states as they are; with ``bits=32`` decoded, in the form that the twin in torch.optim loads."""
        saved = super().state_dict()
        if bits is None:
            return saved
        if bits != 32:
            raise ValueError(f"bits must be None (as the states are) or 32, got {bits!r}")
        state: dict[Any, Any] = {}
        for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=True):
            rule = self._rule_of(ours)
            self._keep_format(ours, rule)
            for key, p in zip(theirs["params"], ours["params"], strict=True):
                if key in saved["state"]:
                    state[key] = self._convert_entries(
                        p, saved["state"][key], _format_of(ours), rule, {**ours, "bits": 32}
                    )
            for name in _OWN:
                theirs.pop(name, None)
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` of this or of the twin in torch.optim returned.

        States come back to the bit where their form is this optimizer's, and are converted (8 to 32 bits, 32 to 8,
        another block size) where it is not. Everything but ``bits``, ``min_size`` and ``block_size`` is taken from
        the checkpoint.

        Raises:
            ValueError: for an unknown format version, or states that do not fit; nothing has been changed then.
        """
        loaded: dict[Tensor, dict[str, Tensor]] = {}

        # torch's method casts every state to its parameter's dtype. It gets none; they come in behind it.
        def take_states(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._convert_saved(saved))
            pairs = zip(saved["param_groups"], self.param_groups, strict=False)
            groups = [
                {**{k: ours[k] for k in self.defaults}, **theirs, **{k: ours[k] for k in _OWN}}
                for theirs, ours in pairs
            ]
            return {**saved, "state": {}, "param_groups": groups + saved["param_groups"][len(groups) :]}

        def put_states(_: Optimizer) -> None:
            self.state.update(loaded)
            for group in self.param_groups:  # the checkpoint may have chosen another rule
                group["state_format"] = StateFormat.of(self._rule_of(group), group["block_size"]).to_dict()

        before = self.register_load_state_dict_pre_hook(take_states)
        after = self.register_load_state_dict_post_hook(put_states, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _convert_saved(self, saved: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The saved states in this optimizer's form, by parameter."""
        result: dict[Tensor, dict[str, Tensor]] = {}
        for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=False):
            parsed, rule = _format_of(theirs), self._rule_of({**ours, **theirs})
            for key, p in zip(theirs["params"], ours["params"], strict=False):
                if key not in saved["state"]:
                    continue
                entries, entries_format = saved["state"][key], parsed
                if bitsandbytes.is_foreign(entries):
                    entries, entries_format = bitsandbytes.translate(p, entries, rule)
                result[p] = self._convert_entries(p, entries, entries_format, rule, ours)
        return result

    def _convert_entries(
        self, p: Tensor, entries: dict[str, Any], saved: StateFormat | None, rule: rules.Rule, group: dict[str, Any]
    ) -> dict[str, Tensor]:
        step = entries.get("step")
        if not isinstance(step, (int, float, Tensor)) or (isinstance(step, Tensor) and step.numel() != 1):
            raise ValueError(f"the checkpoint's step must be one number, got {step!r}; it holds {sorted(entries)}")
        count = shards.full(torch.as_tensor(step)).to(device=shards.local(p).device, dtype=torch.float32)
        converted = {"step": count.reshape(()).clone()}  # states that are converted leave the checkpoint untouched
        for state in rule.states:
            converted.update(blocks.convert(p, state, entries, saved, self._bits(p, group), group["block_size"]))
        if MASTER in entries and _wants_master(p, group):
            saved_master = blocks.checked(p, entries, MASTER, p.shape)
            converted[MASTER] = shards.like(p, blocks.placed(p, saved_master, torch.int8), p.shape)
        known = {
            *converted,
            MASTER,
            *(n for s in rule.states for n in (s.name, blocks.codes_name(s.name), blocks.scales_name(s.name))),
        }
        return {**{k: v for k, v in entries.items() if k not in known}, **converted}


def _format_of(group: dict[str, Any]) -> StateFormat | None:
    saved = group.get("state_format")
    return None if saved is None else StateFormat.parse(saved)


def _replace(entries: dict[str, Tensor], name: str, new: dict[str, Tensor]) -> None:
    for old in (name, blocks.codes_name(name), blocks.scales_name(name)):
        entries.pop(old, None)
    entries.update(new)


def _hyper(rule: rules.Rule, group: dict[str, Any], device: torch.device) -> tuple[Tensor | None, list[float]]:
    """The learning rate if it is a tensor on the device, and the rule's hyperparameters as floats."""
    values = dict(group)
    if "betas" in group:
        values |= {f"beta{i + 1}": beta for i, beta in enumerate(group["betas"])}
    lr = values["lr"]
    on_device = isinstance(lr, Tensor) and lr.device == device
    if on_device:
        values["lr"] = 0.0
    return (lr.detach().float() if on_device else None), [float(values[name]) for name in rule.hyper]


def _local_grad(p: Tensor) -> Tensor:
    """This rank's part of p's gradient, cut as p is."""
    grad = p.grad
    assert grad is not None
    if grad.is_sparse or grad.layout != torch.strided:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has a sparse gradient ({grad.layout}); "
            "build its embedding with sparse=False"
        )
    return shards.part_of(p, grad)


def _check_form(group: dict[str, Any]) -> None:
    if group["bits"] not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, got {group['bits']!r}")
    check_block_size(group["block_size"])


def _check_group(group: dict[str, Any], rule: rules.Rule) -> None:
    _check_form(group)
    if not isinstance(group["min_size"], int) or group["min_size"] < 0:
        raise ValueError(f"min_size must be a number of elements, 0 or more, got {group['min_size']!r}")
    if group["master"] not in (None, "bf16+8"):
        raise ValueError(f'master must be None or "bf16+8", got {group["master"]!r}')
    if group["master"] and group["stochastic_rounding"]:
        raise ValueError('master="bf16+8" rounds its 24-bit copy to nearest; leave stochastic_rounding out')
    for name in ("lr", "eps", "weight_decay", "momentum"):
        if name in group and not float(group[name]) >= 0:
            raise ValueError(f"{name} must be 0 or more, got {group[name]}")
    betas = group.get("betas", ())
    wanted = sum(name.startswith("beta") for name in rule.hyper)
    if len(betas) != wanted:
        raise ValueError(f"betas must be {wanted} numbers, got {betas}")
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")


def _wants_master(p: Tensor, group: dict[str, Any]) -> bool:
    return group["master"] is not None and p.dtype == torch.bfloat16


def _check_dtypes(group: dict[str, Any]) -> None:
    for i, p in enumerate(group["params"]):
        if p.dtype not in FLOATS:
            raise TypeError(f"params[{i}] must be float32, float16 or bfloat16, got {p.dtype}")
        if group["stochastic_rounding"] and p.dtype == torch.float16:
            raise TypeError(f"stochastic_rounding serves bfloat16 parameters; params[{i}] is float16: leave it out")
