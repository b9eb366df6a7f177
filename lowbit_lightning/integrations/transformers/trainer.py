"""An optimizer of this package for Transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from lowbit_lightning import optim

ADAM = ("Adam", "AdamW", "LAMB")
"""Take ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` of TrainingArguments."""


def optimizer(
    args: TrainingArguments, kind: str | type[optim.LowBitOptimizer] = "AdamW", **options: Any
) -> tuple[type[optim.LowBitOptimizer], dict[str, Any]]:
    """What the Trainer takes as ``optimizer_cls_and_kwargs``:

        Trainer(model, args, optimizer_cls_and_kwargs=optimizer(args, "AdamW", paged=True))

    The learning rate comes from ``args``; of Adam, AdamW and LAMB, betas and epsilon too. The Trainer makes the groups
    with and without ``args.weight_decay``. ``args.optim`` has no effect then.

    Args:
        kind: an optimizer's name in ``lowbit_lightning.optim``, or its class.
        options: its other arguments, and ``optim.Options`` (``bits``, ``paged``, ``master``, ...). They come first.

    Raises:
        ValueError: for an unknown name.
    """
    known = {name: one for name, one in vars(optim).items() if _is_optimizer(one)}
    found = known.get(kind) if isinstance(kind, str) else kind
    if found is None or not _is_optimizer(found):
        raise ValueError(f"kind must be an optimizer of lowbit_lightning.optim, one of {sorted(known)}, got {kind!r}")
    own: dict[str, Any] = {"lr": args.learning_rate}
    if found.__name__ in ADAM:
        own |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return found, {**own, **options}


def _is_optimizer(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, optim.LowBitOptimizer) and one is not optim.LowBitOptimizer
