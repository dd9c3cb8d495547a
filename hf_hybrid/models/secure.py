"""Control tokens that somebody typed are text: ``secure(tokenizer)`` and ``AutoHybridTokenizer``.

A tokenizer of the host turns every special token that it finds in a text into its id, wherever the text comes from. A
secured one makes control ids in two places only: what its post-processor puts around a prompt, and what a chat template
itself writes. Everything between is read as ordinary text, in one piece, as the recipes read it for training.

The host can do the first half (``split_special_tokens``) but forgets it for chats, and since 5.16 the second half
(``apply_chat_template(sanitize_control_tokens=True)``), off by default and cutting the text at every tag. Here one way
serves all hosts.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_hybrid.models.vocabulary import VocabularyError, knows_tags

TokenizerT = TypeVar("TokenizerT")

_NONCHARACTERS = (
    *map(chr, range(0xFDD0, 0xFDF0)),
    *(chr(plane << 16 | last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF)),
)
"""Code points that Unicode keeps for the use inside of programs (Unicode 16, section 23.7): no text holds them."""

_NAMES = frozenset({"role", "type"})
"""Keys whose values a chat template compares and joins with its own text, as in ``'<|' + role + '|>'``."""

_HANDLED = ("padding", "truncation", "max_length", "return_tensors")
_PADDING = frozenset({"padding", "padding_side", "pad_to_multiple_of", "return_attention_mask", "return_tensors"})


class SecuredTokenizer(PreTrainedTokenizerBase):
    """What ``secure()`` puts in front of a tokenizer's class; it has no instances of its own."""

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, *args: Any, sanitize_control_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """The host's ``apply_chat_template``: control tokens in messages, tools, documents or template
        variables are text, the template's own are control tokens.

        Args:
            conversation: messages, or a list of them. The other arguments are the host's.
            sanitize_control_tokens: False: as in the host, every control token counts, whoever wrote it.

        Raises:
            VocabularyError: ``return_assistant_tokens_mask``, which needs the host's way of tokenizing.
        """
        host: Any = super().apply_chat_template
        if not sanitize_control_tokens:
            bound = inspect.signature(host).bind(conversation, *args, **kwargs).arguments
            options = {**bound.pop("kwargs", {}), **bound}
            options["tokenizer_kwargs"] = {"split_special_tokens": False, **(options.get("tokenizer_kwargs") or {})}
            return host(**options)
        bound = inspect.signature(host).bind(conversation, *args, **kwargs)
        bound.apply_defaults()
        variables = bound.arguments.pop("kwargs", {})
        options = dict(bound.arguments)
        options.pop("sanitize_control_tokens", None)
        if options.pop("return_assistant_tokens_mask"):
            raise VocabularyError(
                "return_assistant_tokens_mask=True needs the host's way of tokenizing; when all texts are your own, add"
                " sanitize_control_tokens=False"
            )
        tokenize, return_dict = options.pop("tokenize"), options.pop("return_dict")
        encoding = {name: options.pop(name) for name in _HANDLED} | (options.pop("tokenizer_kwargs") or {})
        if not tokenize:
            warnings.warn(
                "the text of a chat, tokenized later by a secured tokenizer, has lost the control tokens of its"
                " template: let apply_chat_template() tokenize it",
                stacklevel=2,
            )
            return host(**options, **variables, tokenize=False)
        marks = _Marks(self, [options["conversation"], options["tools"], options["documents"], variables])
        for name in ("conversation", "tools", "documents"):
            options[name] = marks.put(options[name], joined=True)
        rendered = host(**options, **marks.put(variables), tokenize=False)
        ids = [marks.ids(self, chat) for chat in ([rendered] if isinstance(rendered, str) else rendered)]
        batch = _batch(self, ids, isinstance(rendered, str), encoding)
        return batch if return_dict else batch["input_ids"]


def secure(tokenizer: TokenizerT) -> TokenizerT:
    """Let a tokenizer read typed control tokens as text, in place; the same object comes back.

    Plain calls, ``encode`` and ``apply_chat_template`` then give ids of special tokens only for what the tokenizer or
    the chat template itself adds. One call can ask for the host's behaviour: ``split_special_tokens=False``, for chats
    ``sanitize_control_tokens=False``. What is saved is the tokenizer as it was: secure it again after loading, or load
    it with ``AutoHybridTokenizer``. A second call changes nothing.

    Raises:
        TypeError: not a tokenizer of transformers.
        VocabularyError: the tokenizer makes a control token from plain text, so no flag can help.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"{type(tokenizer).__name__} is no tokenizer of transformers; give AutoTokenizer's")
    host: Any = tokenizer
    before = host.split_special_tokens
    host.split_special_tokens = True
    made = next((text for text in control_texts(host) if _makes(host, text)), None)
    if made is not None:
        host.split_special_tokens = before
        raise VocabularyError(
            f"{type(host).__name__} makes the control token {made!r} from plain text, so texts that hold it cannot be"
            " read as text; use a byte-level tokenizer, or keep such texts away from the model"
        )
    if not isinstance(host, SecuredTokenizer):
        object.__setattr__(host, "__class__", _secured_type(type(host)))
    return tokenizer


class AutoHybridTokenizer:
    """``AutoTokenizer``, and then ``secure()``. Use the class method; there are no instances."""

    def __init__(self) -> None:
        raise TypeError("use AutoHybridTokenizer.from_pretrained(name)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """``AutoTokenizer.from_pretrained`` with the same arguments; typed control tokens are text."""
        return secure(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs))


def secure_known(tokenizer: Any) -> Any:
    """Secure a tokenizer that knows the tags of a plan; any other one comes back as it is, and so does, with a
    warning, one that cannot be secured."""
    if isinstance(tokenizer, PreTrainedTokenizerBase) and knows_tags(tokenizer):
        try:
            secure(tokenizer)
        except VocabularyError as error:
            warnings.warn(f"control tags in prompts stay control tags: {error}", stacklevel=2)
    return tokenizer


def control_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The spelling of every special token, longest first: no token hides one that it is part of."""
    added: Any = tokenizer.added_tokens_decoder
    special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    return tuple(sorted((text for text in special if text), key=lambda text: (-len(text), text)))


class _Marks:
    """Noncharacters around the control tokens that a chat brings along, until the template has been rendered.

    ``start token end`` is a typed control token; ``gap`` is where two texts could join into one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, typed: Any):
        self.texts = control_texts(tokenizer)
        used = set().union(*map(set, _strings(typed)))
        free = [mark for mark in _NONCHARACTERS if mark not in used]
        if len(free) < 3:
            raise VocabularyError("the chat holds the noncharacters of Unicode (U+FDD0 and others); take them out")
        self.start, self.end, self.gap = free[:3]
        token = "|".join(map(re.escape, self.texts)) or "(?!)"
        self.typed = re.compile(token)
        self.pieces = re.compile(f"{self.start}({token}){self.end}|({token})|[{self.start}{self.end}{self.gap}]")
        self.heads = frozenset(text[:cut] for text in self.texts for cut in range(1, len(text)))
        self.tails = frozenset(text[cut:] for text in self.texts for cut in range(1, len(text)))
        self.longest = max(map(len, self.texts), default=0)

    def put(self, value: Any, *, joined: bool = False, name: str = "") -> Any:
        """``value`` with its strings marked; ``joined`` True: also where they could join with what is beside them."""
        if isinstance(value, str):
            return self._put(value, joined, name)
        if isinstance(value, dict):
            return {
                self.put(key): self.put(inner, joined=joined, name=key if isinstance(key, str) else "")
                for key, inner in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.put(inner, joined=joined, name=name) for inner in value]
        return self.put(value.messages, joined=joined) if hasattr(value, "messages") else value

    def _put(self, text: str, joined: bool, name: str) -> str:
        marked = self.typed.sub(f"{self.start}\\g<0>{self.end}", text)
        if not joined or name in _NAMES:
            return marked
        body = text.strip()
        # The space around a text stays outside of its marks, where a template can trim it.
        before, after = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
        inside = bool(body) and any(body in token for token in self.texts)
        if inside or any(body[:n] in self.tails for n in range(1, self.longest)):
            marked = marked[:before] + self.gap + marked[before:]
        if inside or any(body[-n:] in self.heads for n in range(1, self.longest)):
            end = len(marked) - after
            marked = marked[:end] + self.gap + marked[end:]
        return marked

    def ids(self, tokenizer: Any, chat: str) -> list[int]:
        """The token ids of a rendered chat: its unmarked control tokens as such, all between them as text."""
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        ids: list[int] = []
        text, done, strip = "", 0, False
        for piece in self.pieces.finditer(chat):
            text, done = text + chat[done : piece.start()], piece.end()
            typed, written = piece.groups()
            if written is None:
                text += typed or ""
                continue
            token = added.get(written)
            text = text.lstrip() if strip else text
            text = text.rstrip() if getattr(token, "lstrip", False) else text
            ids += [*_text_ids(tokenizer, text, not ids), int(tokenizer.convert_tokens_to_ids(written))]
            text, strip = "", getattr(token, "rstrip", False)
        text += chat[done:]
        return ids + _text_ids(tokenizer, text.lstrip() if strip else text, not ids)


def _text_ids(tokenizer: Any, text: str, first: bool) -> list[int]:
    """A text between control tokens. SentencePiece puts a space before the first text of a call, and only there."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])

    if not text:
        return []
    if first:
        return encode(text)
    line = encode("\n")
    behind = encode("\n" + text)
    return behind[len(line) :] if behind[: len(line)] == line else encode(text)


def _batch(tokenizer: Any, ids: list[list[int]], single: bool, encoding: dict[str, Any]) -> Any:
    """What the host's tokenizer returns for these ids, cut and padded as asked."""
    truncation, length = encoding.pop("truncation"), encoding.pop("max_length")
    encoding.pop("add_special_tokens", None)
    encoding.pop("split_special_tokens", None)
    unknown = encoding.keys() - _PADDING
    if unknown:
        raise VocabularyError(
            f"{', '.join(sorted(unknown))}: not known to a secured tokenizer's chat; leave it out, or add"
            " sanitize_control_tokens=False when all texts are your own"
        )
    if truncation and truncation != "do_not_truncate":
        most = tokenizer.model_max_length if length is None else length
        ids = [line[:most] if tokenizer.truncation_side == "right" else line[-most:] for line in ids]
    alone = single and not encoding["return_tensors"]
    return tokenizer.pad({"input_ids": ids[0] if alone else ids}, max_length=length, **encoding)


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
    elif hasattr(value, "messages"):
        yield from _strings(value.messages)


def _makes(tokenizer: Any, text: str) -> bool:
    """True: ``text``, read as text, gives its own control token (the token for unknown text does not count)."""
    token = tokenizer.convert_tokens_to_ids(text)
    if token == tokenizer.convert_tokens_to_ids(str(tokenizer.unk_token)) and tokenizer.unk_token is not None:
        return False
    return token in tokenizer(text, add_special_tokens=False)["input_ids"]


@functools.cache
def _secured_type(host: type) -> type:
    """The subclass of ``host`` that reads typed control tokens as text, made once; saved under the host's name."""

    def reduce(self: Any, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (host,), self.__getstate__()

    body = {"__module__": host.__module__, "__qualname__": f"Secured{host.__qualname__}", "__reduce_ex__": reduce}
    return type(host)(host.__name__, (SecuredTokenizer, host), body)


def _rebuild(host: type) -> Any:
    """An empty instance of the secured type of ``host``, to be filled by ``pickle`` or ``copy``."""
    secured: Any = _secured_type(host)
    return secured.__new__(secured)
