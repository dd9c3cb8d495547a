"""Control tokens: the ids of a vocabulary that are no text.

A noisy window needs a few of them. The tags of plans are the business of a grammar (`hf_hybrid.core.grammars`), and a
model may have none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_REPAIR = "run hf_hybrid.prepare_vocabulary(model, tokenizer) to write it anew"


class VocabularyError(ValueError):
    """Control tokens that cannot be added, or a record of them that cannot be used; the message names the fix."""


@dataclass(frozen=True)
class NoiseTokens:
    """What a noisy window needs of a vocabulary.

    Attributes:
        mask: at open positions. end: ends an answer, None: the model names no such id. filler: behind
        the end of a text, where a window reaches beyond it, and is never committed; None: the model has none.
        banned: every id that is never part of a text, tags included; all but ``end``.
    """

    mask: int
    end: int | None
    filler: int | None
    banned: tuple[int, ...]


class Tags(ABC):
    """The tags of a grammar, which alone knows what they mean."""

    @property
    @abstractmethod
    def ids(self) -> tuple[int, ...]:
        """Every id among them."""


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a model: what noise needs, and the tags of plans.

    Attributes:
        noise: mask, end and filler. tags: None: the model has a mask token alone, and writes no plans. grammar: the
        name of the grammar that reads the tags (a key of ``GRAMMARS``).
    """

    noise: NoiseTokens
    tags: Tags | None = None
    grammar: str = "native"

    @classmethod
    def of(
        cls, *, mask: int, end: int | None, filler: int | None, tags: Tags | None = None, grammar: str = "native"
    ) -> ControlTokens:
        """The pair, with every id of it but ``end`` banned from texts."""
        others = () if filler is None else (filler,)
        banned = tuple(dict.fromkeys((mask, *others, *(tags.ids if tags is not None else ()))))
        return cls(NoiseTokens(mask, end, filler, banned), tags, grammar)


class Record:
    """``config.hf_hybrid``, read entry by entry: a value that is no id of the vocabulary is a ``VocabularyError``.

    Args:
        values: name -> id, list of ids, or list of pairs. size: tokens of the vocabulary.
    """

    def __init__(self, values: Mapping[str, Any], size: int):
        self.values, self.size = values, size

    def require(self, names: Iterable[str]) -> None:
        """All of ``names`` must be in the record."""
        missing = [name for name in names if name not in self.values]
        if missing:
            raise VocabularyError(f"config.hf_hybrid has no {', '.join(missing)}; {_REPAIR}")

    def token(self, name: str) -> int:
        """The id under ``name``."""
        return self.checked(name, self.values[name])

    def tokens(self, name: str) -> tuple[int, ...]:
        """The list of ids under ``name``."""
        value = self.values[name]
        items = _items(value)
        if items is None:
            raise VocabularyError(f"config.hf_hybrid[{name!r}] must be a list of token ids, got {value!r}; {_REPAIR}")
        return tuple(self.checked(f"{name}[{i}]", token) for i, token in enumerate(items))

    def lengths(self, name: str) -> tuple[tuple[int, int], ...]:
        """The list of ``(length in tokens, id)``, rising, under ``name``."""
        value = self.values[name]
        listed = _items(value)
        items = [_items(item) or [] for item in listed or ()]
        if listed is None or any(len(item) != 2 for item in items):
            raise VocabularyError(
                f"config.hf_hybrid[{name!r}] must be a list of [tokens, id], got {value!r}; {_REPAIR}"
            )
        pairs: list[tuple[int, int]] = []
        for tokens, token in items:
            previous = pairs[-1][0] if pairs else 0
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= previous:
                raise VocabularyError(
                    f"config.hf_hybrid[{name!r}]: {tokens!r} must be a whole number above {previous}; {_REPAIR}"
                )
            pairs.append((tokens, self.checked(f"{name}[{len(pairs)}]", token)))
        if not pairs:
            raise VocabularyError(f"config.hf_hybrid[{name!r}] is empty; a plan needs at least one length; {_REPAIR}")
        return tuple(pairs)

    def checked(self, name: str, value: object, place: str = "config.hf_hybrid") -> int:
        """``value``, which is under ``name`` in ``place``, if it is an id of the vocabulary."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise VocabularyError(f"{place}: {name} must be a token id, got {value!r}; {_REPAIR}")
        if not 0 <= value < self.size:
            raise VocabularyError(f"{place}: {name}={value} is outside the vocabulary of {self.size} tokens; {_REPAIR}")
        return value

    def known(self, names: Iterable[str]) -> tuple[int, ...]:
        """Every id under ``names``, as far as there are any; nothing is an error."""
        found: list[int] = []
        for name in names:
            value = self.values.get(name)
            items = _items(value)
            for item in [value] if items is None else items:
                pair = _items(item)
                token = pair[1] if pair is not None and len(pair) == 2 else item
                if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < self.size:
                    found.append(token)
        return tuple(dict.fromkeys(found))

    def check_meanings(self, control: ControlTokens) -> None:
        """No id may have two meanings; that which ends an answer counts too."""
        tags = control.tags.ids if control.tags is not None else ()
        every = [i for i in (control.noise.mask, control.noise.filler, *tags, control.noise.end) if i is not None]
        twice = sorted({i for i in every if every.count(i) > 1})
        if twice:
            raise VocabularyError(f"config.hf_hybrid gives token {twice[0]} two meanings (eos counts too); {_REPAIR}")


def _items(value: Any) -> list[Any] | None:
    """The items of a list or a tuple; None: it is neither."""
    return [*value] if isinstance(value, (list, tuple)) else None
