"""What drafters with a model of their own share: is it of the same family, and which batch row holds which text."""

from __future__ import annotations

from typing import Any

from hf_hybrid.decoding.drafters.drafter import DrafterError, Text
from hf_hybrid.models.runner import Runner
from hf_hybrid.models.vocabulary import width_of

MOST_PADDING = 1024
"""Vocabularies whose sizes differ by more are not taken for one tokenizer with another padding."""


def check_family(own: Any, model: Any, vocab_size: int) -> None:
    """Refuse a drafting model ``own`` that seems to have another tokenizer than ``model``.

    Args:
        vocab_size: width of the logits of ``model``; vocabularies may be padded differently.

    Raises:
        DrafterError: the sizes are too far apart, or no end token is the same.
    """
    size = width_of(own)
    ends = [_ids(host.generation_config.eos_token_id) for host in (model, own)]
    if abs(size - vocab_size) > MOST_PADDING or (all(ends) and not ends[0] & ends[1]):
        raise DrafterError(
            f"the drafter ({size} tokens, ends {sorted(ends[1])}) seems to have another tokenizer than the model "
            f"({vocab_size} tokens, ends {sorted(ends[0])}); take one of the same family, or vouch for it: "
            "ModelDrafter(drafter, tokenizer=..., target_tokenizer=...)"
        )


def positions_of(model: Any) -> int:
    """Positions that ``model`` was made for."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 40


def _ids(value: Any) -> set[int]:
    """Token ids of a config: one, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else {int(v) for v in value}


class BatchRows:
    """Texts in the batch rows of a drafter's own Runner.

    Attributes:
        runner: of the drafting model. line: text -> its batch row.
    """

    def __init__(self, runner: Runner):
        self.runner, self.line = runner, dict[Text, int]()
        self._texts: list[Text] = []

    def enter(self, text: Text) -> None:
        """An empty batch row for ``text``."""
        if len(self._texts) == self.runner.active:
            self.runner.enter()
        self.line[text] = len(self._texts)
        self._texts.append(text)

    def leave(self, text: Text) -> None:
        """The batch row of ``text`` is free; the last one moves there."""
        line, last = self.line.pop(text), self._texts.pop()
        if last is not text:
            self._texts[line], self.line[last] = last, line
        self.runner.leave(line)
