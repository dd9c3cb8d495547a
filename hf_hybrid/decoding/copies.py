"""Copies of what a caller hands in for a whole batch, one for each sequence: here sequences are written one by one."""

from __future__ import annotations

import copy
from types import CellType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from hf_hybrid.decoding.output import DecodingError

T = TypeVar("T")
_SHARED = (torch.nn.Module, PreTrainedTokenizerBase, ModuleType)
"""Large, and not changed by being used."""
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Tensor, type)


def own_copy(thing: T) -> T:
    """A deep copy with a state of its own; models and tokenizers in it stay the same objects. A function in it that
    keeps something between its calls, in a closure or a default, has that copied too.

    Raises:
        DecodingError: it cannot be copied.
    """
    try:
        memo, functions = _kept(thing)
        _copy_functions(functions, memo)
        return copy.deepcopy(thing, memo)
    except Exception as error:  # a class may do anything here
        raise DecodingError(
            f"{name_of(thing)} cannot be copied, and every sequence of a batch needs its own, because sequences are "
            f"written one by one here; call generate() with one prompt at a time ({type(error).__name__}: {error})"
        ) from error


def name_of(thing: Any) -> str:
    """Class of an object, or the name of a function."""
    return getattr(thing, "__name__", type(thing).__name__)


def _copy_functions(functions: list[FunctionType], memo: dict[int, Any]) -> None:
    """Put copies of functions with a state into the memo of a deep copy, which would take the functions themselves."""
    cells: dict[int, tuple[CellType, CellType]] = {}  # id -> one of a closure and its copy; functions may share it
    copies: list[tuple[FunctionType, FunctionType]] = []
    for function in functions:
        closure = function.__closure__ or ()
        own = tuple(cells.setdefault(id(cell), (cell, CellType()))[1] for cell in closure)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, None, own)
        memo[id(function)] = made
        copies.append((function, made))
    for cell, own_cell in cells.values():
        if not _empty(cell):
            own_cell.cell_contents = copy.deepcopy(cell.cell_contents, memo)
    for function, made in copies:
        made.__defaults__ = copy.deepcopy(function.__defaults__, memo)
        made.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
        made.__dict__.update(copy.deepcopy(vars(function), memo))


def _empty(cell: CellType) -> bool:
    """True: the variable was not assigned yet."""
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _kept(thing: Any) -> tuple[dict[int, Any], list[FunctionType]]:
    """The memo of a deep copy that keeps what is not to be copied, and the functions in it that have a state."""
    memo: dict[int, Any] = {}
    functions: list[FunctionType] = []
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, _SHARED):
            memo[id(value)] = value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif isinstance(value, FunctionType):
            state = [cell.cell_contents for cell in value.__closure__ or () if not _empty(cell)]
            state += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
            waiting += state
            if state:
                functions.append(value)
        else:
            waiting += getattr(value, "__dict__", {}).values()
            waiting += [getattr(value, name) for name in ("func", "__func__", "__self__") if hasattr(value, name)]
    return memo, functions
