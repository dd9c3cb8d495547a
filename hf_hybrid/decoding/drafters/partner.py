"""What drafters with a model of their own share: is it of the same family, and which batch row holds which text."""

from __future__ import annotations

from typing import Any

from hf_hybrid.decoding.drafters.drafter import DrafterError, Text
from hf_hybrid.models.host import end_ids, trained_positions
from hf_hybrid.models.opening import open_runner
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
    ends = [end_ids(host) for host in (model, own)]
    if abs(size - vocab_size) > MOST_PADDING or (all(ends) and not ends[0] & ends[1]):
        raise DrafterError(
            f"the drafter ({size} tokens, ends {sorted(ends[1])}) seems to have another tokenizer than the model "
            f"({vocab_size} tokens, ends {sorted(ends[0])}); take one of the same family, or vouch for it: "
            "ModelDrafter(drafter, tokenizer=..., target_tokenizer=...)"
        )


def positions_of(model: Any) -> int:
    """Positions that ``model`` was made for."""
    return trained_positions(model) or 1 << 40


class BatchRows:
    """Texts in the batch rows of a drafter's own Runner, which is there while there are texts.

    Args:
        model: that drafts. batch_size: most texts at a time.

    Attributes:
        line: text -> its batch row.

    Raises:
        Unsupported: the Runner does not serve the model. DrafterError: its passes need all processes.
    """

    def __init__(self, model: Any, batch_size: int):
        self._model, self._batch_size = model, batch_size
        # Made before there is a text, so that a model which does not go is refused before anything is written.
        self._runner: Runner | None = self._empty_runner()
        self.line = dict[Text, int]()
        self._texts: list[Text] = []

    def _empty_runner(self) -> Runner:
        runner = open_runner(self._model, self._batch_size)
        if runner.ranks.synced:
            raise DrafterError(
                "the drafting model is spread over processes (FSDP or ZeRO-3), each of which drafts when it needs to; "
                "load it whole in every process"
            )
        while runner.active:
            runner.leave(runner.active - 1)
        return runner

    @property
    def runner(self) -> Runner:
        """Of the drafting model; its active batch rows are those of the texts."""
        if self._runner is None:
            self._runner = self._empty_runner()
        return self._runner

    def enter(self, text: Text) -> None:
        """An empty batch row for ``text``."""
        self.line[text] = self.runner.enter()
        self._texts.append(text)

    def leave(self, text: Text) -> None:
        """The batch row of ``text`` is free; the last one moves there. With the last text the cache goes."""
        line, last = self.line.pop(text), self._texts.pop()
        if last is not text:
            self._texts[line], self.line[last] = last, line
        self.runner.leave(line)
        if not self._texts:
            self._runner = None
