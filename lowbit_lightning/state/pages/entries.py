"""The value of ``optimizer.state[p]`` for a parameter with paged states."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from copy import deepcopy
from typing import Any
from weakref import WeakSet

from torch import Tensor

from lowbit_lightning.state import shards
from lowbit_lightning.state.pages.pager import Pager

_PAGERS: WeakSet[Pager] = WeakSet()


class Entries:
    """The entries of a parameter, some of which lie in a pager's slab. It can be read like a dict.

    A reader of a value sees the states as the last step left them: states in near memory are stored first, and no copy
    is under way. A tensor that was read is the slab's memory, and later steps change it without notice. So read it
    again, or clone it. Assigning a tensor to a paged state copies it into the slab.

    The class is not a ``Mapping``: Lightning moves the content of mappings to the device, and these entries must stay.
    ``dict(entries)`` works.
    """

    def __init__(self, p: Tensor, entries: Mapping[str, Any], pager: Pager, number: int) -> None:
        """Take over the ``entries`` of p, which is parameter ``number`` of the pager. Those that the pager wants are
        copied into its slab."""
        self._p, self.pager, self.number = p, pager, number
        _PAGERS.add(pager)
        self._far = pager.far[number]
        pager.write(number, {name: shards.local(entries[name]) for name in self._far})
        self.raw: dict[str, Any] = {**entries, **self._far}
        """The same entries, without waiting: paged ones may be out of date."""

    @property
    def place(self) -> tuple[Pager, int]:
        return self.pager, self.number

    def named(self) -> dict[str, Any]:
        """The entries in the form that they have without paging: DTensors if p is one. Nothing is copied."""
        return {
            name: shards.leave(self._p, value, self._p.shape, stays=True) if self.is_paged(name) else value
            for name, value in self.items()
        }

    def _settled(self) -> dict[str, Any]:
        self.pager.settle()
        return self.raw

    def is_paged(self, name: str) -> bool:
        return name in self._far

    def keys(self) -> KeysView[str]:
        return self.raw.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __contains__(self, name: object) -> bool:
        return name in self.raw

    def __getitem__(self, name: str) -> Any:
        return self._settled()[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self._settled().get(name, default)

    def items(self) -> ItemsView[str, Any]:
        return self._settled().items()

    def values(self) -> ValuesView[Any]:
        return self._settled().values()

    def __setitem__(self, name: str, value: Any) -> None:
        if self.is_paged(name):
            self.pager.write(self.number, {name: shards.local(value)})
        else:
            self.raw[name] = value

    def __repr__(self) -> str:
        return f"Entries({self.raw})"

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return deepcopy(self.named(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.named(),)


def raw(entries: Any) -> dict[str, Any]:
    """The entries as a dict, without waiting: paged ones may be out of date."""
    return entries.raw if isinstance(entries, Entries) else entries


def in_a_slab(value: Tensor) -> bool:
    """Whether a tensor is memory of a pager, whose steps change it."""
    address = shards.local(value).data_ptr()
    slabs = (pager._slab for pager in _PAGERS)
    return any(slab.data_ptr() <= address < slab.data_ptr() + slab.numel() for slab in slabs)
