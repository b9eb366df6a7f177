"""Which linear layers compute a model's outputs. Rounding these costs more quality than it saves time.

The output layer of a module is certain only when it runs, but there are good signs. In this order:

1. **What the model says.** A layer whose weight is also an ``nn.Embedding``'s (tied); what ``get_output_embeddings()``
   (Transformers) or ``get_classifier()`` (timm) returns. This decides for the part of the model that holds both, or
   that has the method.
2. **What the sizes say.** The number of output features equals the number of rows of an embedding, or ``num_classes``
   or ``num_labels`` of the model, its ``config`` or its ``hparams``. It differs from the number of input features, and
   the layer is not inside a numbered block.
3. **What nothing reads.** A body's layer gives what another layer takes: its output features are the input features of
   some layer, norm or convolution. The layers that a model holds itself come first (a head, or several); where none of
   them is one, each of its parts is looked at by itself (student and teacher, generator and discriminator).
4. **The last one** that the model defines, unless a convolution comes after it (a UNet): a guess.

Several layers may be outputs. In doubt a layer counts as an output layer: this costs a little time, and the opposite
would cost quality. ``Outputs.doubtful`` names layers for which only a part of the model, or their position, is the
sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

_CLASSES = ("num_classes", "num_labels", "n_classes")
_ASKED = ("get_output_embeddings", "get_classifier")


@dataclass
class Outputs:
    """``known``: names of output layers. ``doubtful``: names -> why they count as output layers."""

    known: set[str] = field(default_factory=set)
    doubtful: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        return self.known | set(self.doubtful)


def output_layers(module: nn.Module, candidates: Mapping[str, nn.Module]) -> Outputs:
    """The output layers among the candidates (name -> linear layer) of a model."""
    linears = {name: m for name, m in candidates.items() if sizes(m) is not None}
    known, settled = _said(module, linears)
    open_ = {name: m for name, m in linears.items() if not any(_within(name, part) for part in settled)}
    outputs = Outputs(known)
    if not open_:
        return outputs
    counted = _counted(module)
    by_size = {n for n, m in open_.items() if _gives_one_of(counted, m) and not _in_numbered_block(n)}
    _Unread(module, open_, outputs).look_at(module, "")
    last = list(open_)[-1]
    if not (outputs.names or by_size or _in_numbered_block(last) or _ends_in_convolution(module, open_)):
        outputs.doubtful[last] = "the last linear layer that the model defines"
    if by_size:
        outputs.known, outputs.doubtful = outputs.known | by_size, {}
    return outputs


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(input features, output features) of an ``nn.Linear`` or a Transformers' ``Conv1D``; None of others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    conv: Any = module
    if not isinstance(getattr(conv, "nf", None), int):
        return None
    return conv.nx if hasattr(conv, "nx") else conv.weight.shape[0], conv.nf  # older versions don't keep nx


def _gives_one_of(counted: set[int], module: nn.Module) -> bool:
    """Whether it turns features into as many others as one of these; a pooler may be as wide as a table is long."""
    size_in, size_out = sizes(module) or (0, 0)
    return size_in != size_out and size_out in counted


# -- what the model says ---------------------------------------------------------------------------------------------


def _said(module: nn.Module, linears: Mapping[str, nn.Module]) -> tuple[set[str], list[str]]:
    """Output layers by rule 1, and the parts of the model (names of modules) that this settles."""
    named = {id(m): name for name, m in linears.items()}
    known, settled = set(), []
    for name, owner in module.named_modules():
        for method in _ASKED:
            for head in _asked(getattr(owner, method, None)):
                if id(head) in named:
                    known.add(named[id(head)])
                    settled.append(name)
    embeddings = [(name, m.weight) for name, m in module.named_modules() if isinstance(m, nn.Embedding)]
    for name, linear in linears.items():
        for other in (n for n, weight in embeddings if weight is linear.weight):
            known.add(name)
            settled.append(_common(name, other))
    return known, settled


def _asked(method: Callable[[], Any] | None) -> tuple[Any, ...]:
    try:
        heads = method() if callable(method) else None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it means another thing
        return ()
    return tuple(heads) if isinstance(heads, tuple | list) else (heads,)


def _counted(module: nn.Module) -> set[int]:
    """The sizes of vocabularies and numbers of classes that modules of the model name."""
    found: set[Any] = set()
    for m in module.modules():
        if isinstance(m, nn.Embedding):
            found.add(m.num_embeddings)
        for holder in (m, getattr(m, "config", None), getattr(m, "hparams", None)):
            found |= {getattr(holder, name, None) for name in _CLASSES if isinstance(getattr(holder, name, None), int)}
    return found - {None, 0, 1, 2}


# -- what nothing reads ----------------------------------------------------------------------------------------------


class _Unread:
    """Looks for linear layers whose output features nothing takes."""

    def __init__(self, module: nn.Module, linears: Mapping[str, nn.Module], outputs: Outputs) -> None:
        self.linears, self.outputs = linears, outputs
        self.readers: dict[int, list[str]] = {}
        for name, m in module.named_modules():
            if (size := _taken(m)) is not None:
                self.readers.setdefault(size, []).append(name)

    def look_at(self, module: nn.Module, name: str, scope: str = "") -> None:
        """Find the outputs of a part of the model: among the layers that it holds itself, or else in its parts.

        ``scope``: the part of the whole model that it belongs to, which may be a model by itself.
        """
        held, parts = self._held(module, name)
        while not held and len(parts) == 1:
            name, module = parts[0]
            held, parts = self._held(module, name)
        chain = isinstance(module, nn.Sequential)
        if chain:
            last = [n for n, m in _children(module, name) if any(True for _ in m.parameters())][-1:]
            held, parts = [n for n in held if n in last], [(n, m) for n, m in parts if n in last]
            if not scope and held:
                self.outputs.known.update(held)  # what runs last is known
                return
        unread = [n for n in held if not self._is_read(n, scope, chain)]
        if scope or not parts:  # a head may be defined first; a merged q, k, v, which others follow, is none
            unread = list(takewhile(lambda n: n in unread, reversed(held)))
        for n in unread:
            if self._is_read(n, "", chain):
                self.outputs.doubtful[n] = f"nothing in {scope} takes what it gives"
            else:
                self.outputs.known.add(n)
        if not unread:
            for n, m in parts:
                self.look_at(m, n, scope or n)

    def _held(self, module: nn.Module, name: str) -> tuple[list[str], list[tuple[str, nn.Module]]]:
        """The linear layers that a module holds itself, or in a list or dict; and its parts with layers inside."""
        held: list[str] = []
        parts: list[tuple[str, nn.Module]] = []
        for n, m in _children(module, name):
            own, inner = self._held(m, n) if isinstance(m, nn.ModuleList | nn.ModuleDict) else ([], [])
            if n in self.linears:
                held.append(n)
            elif own or inner:
                held, parts = held + own, parts + inner
            elif any(_within(linear, n) for linear in self.linears):
                parts.append((n, m))
        return held, parts

    def _is_read(self, name: str, within: str, chain: bool) -> bool:
        """Whether a module takes as many features; in a chain, one that comes after it or lies elsewhere."""
        size_in, size_out = sizes(self.linears[name])  # type: ignore[misc]
        owner = name.rpartition(".")[0] + "."
        readers = [n for n in self.readers.get(size_out, ()) if _within(n, within)]
        return size_in == size_out or any(not (chain and n.startswith(owner)) for n in readers)


def _taken(module: nn.Module) -> int | None:
    """How many features a module takes; None if unknown."""
    if (linear := sizes(module)) is not None:
        return linear[0]
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1]
    for name in ("in_channels", "num_features", "num_channels", "input_size", "embed_dim"):
        if isinstance(size := getattr(module, name, None), int):
            return size
    return None


def _ends_in_convolution(module: nn.Module, linears: Mapping[str, nn.Module]) -> bool:
    order = [name for name, m in module.named_modules() if name in linears or isinstance(m, _ConvNd)]
    return bool(order) and order[-1] not in linears


# -- names -----------------------------------------------------------------------------------------------------------


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child, m in module.named_children():
        yield f"{name}.{child}" if name else child, m


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(part + ".")


def _common(a: str, b: str) -> str:
    """The name of the innermost module that holds both."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    shared: list[str] = []
    for x, y in pairs:
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)


def _in_numbered_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split(".")[:-1])
