"""Torch's ``load_state_dict`` without its states: torch would cast every state to its parameter's dtype."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lowbit_lightning.state.pages import Entries


def load(
    optimizer: Optimizer,
    torch_load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    withhold_states: Callable[[dict[str, Any]], dict[str, Any]],
    install: Callable[[], None],
) -> None:
    """Run torch's method ``torch_load`` on what ``withhold_states`` makes of the checkpoint, and ``install`` the states
    after it, before any hook of the user's. If anything fails, nothing has been changed."""
    _remove_hooks(optimizer)  # an interrupt may have ended an earlier load before it could clean up
    optimizer.register_load_state_dict_pre_hook(lambda _, found: withhold_states(found))
    optimizer.register_load_state_dict_post_hook(lambda _: install(), prepend=True)
    try:
        with all_or_nothing([optimizer]):
            torch_load(state_dict)
    except OSError as error:
        if error.errno != errno.ENOSPC or not any(isinstance(held, Entries) for held in optimizer.state.values()):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}, or give up the states of before, which are kept until all new ones are there: "
            "optimizer.state.clear(), and load again, both after the except block, whose traceback keeps them alive",
        ) from error
    finally:
        _remove_hooks(optimizer)


def _remove_hooks(optimizer: Optimizer) -> None:
    """Remove the hooks of ``load``."""
    for hooks in (optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks):
        for number in [n for n, hook in hooks.items() if getattr(hook, "__module__", None) == __name__]:
            del hooks[number]


@contextmanager
def all_or_nothing(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """If a load inside fails, the optimizers keep their old states, groups and stores."""
    names = ("state", "param_groups", "_states")  # loading makes new ones
    before = [{name: vars(optimizer)[name] for name in names if name in vars(optimizer)} for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for optimizer, attributes in zip(optimizers, before, strict=True):
            vars(optimizer).pop("_states", None)
            vars(optimizer).update(attributes)
        raise
