"""Lease: one drafter object in several calls at the same time, from threads or from iterators that take turns.

A drafter keeps what it knows of its texts on itself. So a call gets the object itself when no other call has it, and
else a copy, which ``prepare`` then begins anew as it would behind a call that was broken off.
"""

from __future__ import annotations

import copy
from collections import deque
from threading import Lock
from typing import Any
from weakref import ref

from hf_hybrid.decoding.drafters.drafter import Drafter, DrafterError

_CONTAINERS = (list, dict, set, deque)
_LOCK = Lock()
_owners: dict[int, ref[Lease]] = {}
"""id of a drafter that serves a call -> its lease, which keeps the drafter alive; a dead one: it is free."""


class Lease:
    """The use of a drafter by one call, until ``end()`` or until nobody holds it.

    Args:
        drafter: the caller's; the drafters among its attributes are leased with it.

    Attributes:
        drafter: that serves the call.

    Raises:
        DrafterError: another call has it, and it cannot be copied.
    """

    def __init__(self, drafter: Drafter):
        self._held: dict[int, Drafter] = {}
        with _LOCK:
            self.drafter = self._taken(drafter, {})

    def end(self) -> None:
        """The call is over; the next one may have the object itself."""
        with _LOCK:
            for number in self._held:
                owner = _owners.get(number)
                if owner is not None and owner() is self:
                    del _owners[number]
            self._held.clear()

    def _taken(self, drafter: Drafter, seen: dict[int, Drafter]) -> Drafter:
        """``drafter`` if it and those in it are free, else a copy."""
        if id(drafter) in seen:
            return seen[id(drafter)]
        seen[id(drafter)] = drafter
        own = getattr(drafter, "__dict__", {})
        inner = {name: self._taken(value, seen) for name, value in own.items() if isinstance(value, Drafter)}
        owner = _owners.get(id(drafter))
        free = owner is None or owner() is None
        if free and all(inner[name] is own[name] for name in inner):
            self._held[id(drafter)] = drafter
            _owners[id(drafter)] = ref(self)
            return drafter
        seen[id(drafter)] = copied = _copied(drafter)
        for name, value in inner.items():
            setattr(copied, name, value)
        return copied


def _copied(drafter: Drafter) -> Drafter:
    """A copy with containers of its own; what is in them, a model and a memory are shared."""
    try:
        copied = copy.copy(drafter)
    except Exception as error:  # a class may do anything here
        raise DrafterError(
            f"this {type(drafter).__name__} serves another call at the same time and cannot be copied ({error}); "
            "give each call a drafter of its own"
        ) from error
    state: dict[str, Any] = getattr(copied, "__dict__", {})
    if not hasattr(type(drafter), "__copy__"):  # which knows better
        state.update({name: copy.copy(value) for name, value in state.items() if isinstance(value, _CONTAINERS)})
    return copied
