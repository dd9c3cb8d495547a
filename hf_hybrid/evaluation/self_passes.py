"""Checks of passes: do the rows of a Runner give what the model's own forward gives for the same text?

The oracle is one forward of the whole text without a cache, the host's own. Each check says in words what differed, or
nothing, and comes with the strategies that stand on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.host import Unsupported, forward_parameters, start_device, without_extras
from hf_hybrid.models.opening import open_runner
from hf_hybrid.models.probe import apart
from hf_hybrid.models.replay import ReplayRunner
from hf_hybrid.models.runner import Runner

ROWS = 6
"""Rows of a pass behind the prompt."""


@dataclass(frozen=True)
class Passes:
    """Passes over random texts.

    Args:
        model: that a Runner serves, in eval mode.
        long, short: two prompts of different lengths.
        other, wrong: ``ROWS`` tokens that go on behind them, and others that do not.
    """

    model: Any
    long: list[int]
    short: list[int]
    other: list[int]
    wrong: list[int]

    def padding(self) -> str:
        """Two prompts of unequal length in one pass, then a row for each: what every strategy does."""
        runner = self._open(2)
        width = len(self.long)
        tokens = torch.zeros((2, width), dtype=torch.int64)
        position, span = torch.zeros_like(tokens), torch.full_like(tokens, PADDING)
        for line, prompt in enumerate((self.long, self.short)):
            first = width - len(prompt)
            tokens[line, first:] = torch.tensor(prompt)
            position[line, first:], span[line, first:] = torch.arange(len(prompt)), 0
        first_scores = runner.run(tokens, Rows.clean(position, span), 1).logits[:, -1].clone()
        runner.commit()
        position = torch.tensor([[len(self.long)], [len(self.short)]])
        tokens = torch.tensor([self.other[:1]] * 2)
        scores = runner.run(tokens, Rows.clean(position, torch.zeros_like(position)), 1, plain=True).logits[:, -1]
        runner.commit()
        for line, prompt in enumerate((self.long, self.short)):
            alone = self._open(1)
            wanted = [_run(alone, prompt, 0, plain=True, keep=1), _run(alone, self.other[:1], len(prompt), plain=True)]
            if apart(torch.cat(wanted), torch.stack([first_scores[line], scores[line]])):
                return "two prompts of unequal length, read in one pass, give other logits than each alone"
        return ""

    def steps(self) -> str:
        """Several tokens in one pass, and the same one by one: what checks drafts."""
        begin = len(self.long)
        runner = self._begun(self.long)
        single = [_run(runner, [token], begin + i, plain=True) for i, token in enumerate(self.other)]
        wanted = torch.cat(single)
        for plain in (True, False):
            if apart(wanted, _run(self._begun(self.long), self.other, begin, plain=plain)):
                return f"{ROWS} tokens in one pass give other logits than one by one"
        if apart(self.read([*self.long, *self.other], ROWS), wanted):
            return "passes with our cache give other logits than the model's own forward of the whole text"
        return ""

    def rejected(self) -> str:
        """Rows that are run and not committed, and the text that goes on behind those that are: a rejected draft."""
        kept, begin = 2, len(self.long)
        runner = self._begun(self.long)
        _run(runner, [*self.other[:kept], *self.wrong[kept:]], begin, keeps=kept)
        scores = _run(runner, self.other[kept:], begin + kept)
        if apart(self.read([*self.long, *self.other], ROWS - kept), scores):
            return "rejected rows are not forgotten: behind them the logits are other ones than without them"
        return ""

    def branches(self) -> str:
        """Two branches in one pass, at the same positions: a tree of drafts."""
        _, scores = self._side_by_side()
        if apart(self._wanted_side_by_side(ROWS), scores):
            return "branches side by side in one pass give other logits than each alone"
        return ""

    def spans(self) -> str:
        """Two parts that do not read one another, over two passes: the parts of a plan."""
        runner, _ = self._side_by_side(committed=3)
        half = ROWS - 3
        position = torch.arange(len(self.long) + 3, len(self.long) + ROWS).repeat(2)[None]
        span = torch.tensor([[1] * half + [2] * half])
        tokens = torch.tensor([[*self.other[3:], *self.wrong[3:]]])
        scores = runner.run(tokens, Rows.clean(position, span), 2 * half).logits[0].clone()
        runner.commit()
        if apart(self._wanted_side_by_side(half), scores):
            return "separate spans in one pass give other logits than each behind the trunk alone"
        return ""

    def noisy_rows(self) -> str:
        """A window of open positions, after one that was dropped: what diffusion denoises."""
        try:
            oracle = open_runner(self.model, 1, kind=ReplayRunner)
        except Unsupported:
            return ""
        found: list[Tensor] = []
        for runner in (self._begun(self.long), oracle):
            if runner is oracle:
                _run(runner, self.long, 0)
            begin = len(self.long)
            position = torch.arange(begin, begin + ROWS)[None]
            anchor = torch.full_like(position, begin)
            rows = Rows(
                position, torch.zeros_like(position), torch.ones_like(position, dtype=torch.bool), anchor, anchor
            )
            for tokens in (self.wrong, self.other):
                found.append(runner.run(torch.tensor([tokens]), rows, ROWS).logits[0].clone())
                runner.commit()
        if apart(torch.cat(found[2:]), torch.cat(found[:2])):
            return "a window of open positions gives other logits with our cache than without"
        return ""

    def _side_by_side(self, committed: int = ROWS) -> tuple[Runner, Tensor]:
        """Two spans behind the prompt, their first ``committed`` rows in one pass; with its logits."""
        runner = self._begun(self.long)
        for span in (1, 2):
            runner.relate(0, span, [0])
        position = torch.arange(len(self.long), len(self.long) + committed).repeat(2)[None]
        span = torch.tensor([[1] * committed + [2] * committed])
        tokens = torch.tensor([[*self.other[:committed], *self.wrong[:committed]]])
        scores = runner.run(tokens, Rows.clean(position, span), 2 * committed).logits[0].clone()
        runner.commit()
        return runner, scores

    def _wanted_side_by_side(self, keep: int) -> Tensor:
        return torch.cat([self.read([*self.long, *branch], keep) for branch in (self.other, self.wrong)])

    def _open(self, batch_size: int) -> Runner:
        return open_runner(self.model, batch_size, capacity=len(self.long) + 4 * ROWS)

    def _begun(self, prompt: list[int]) -> Runner:
        """A Runner that has read ``prompt``."""
        runner = self._open(1)
        _run(runner, prompt, 0, plain=True, keep=1)
        return runner

    @torch.no_grad()
    def read(self, ids: Sequence[int], keep: int) -> Tensor:
        """Logits ``(keep, vocab)`` of the last tokens of a text by the model's own forward, without a cache."""
        tokens = torch.tensor([list(ids)], device=start_device(self.model))
        options: dict[str, Any] = {"use_cache": False, "return_dict": True, **without_extras(self.model)}
        if "logits_to_keep" in forward_parameters(self.model):
            options["logits_to_keep"] = keep
        return self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).logits[0, -keep:].clone()


def _run(
    runner: Runner, ids: Sequence[int], begin: int, *, plain: bool = False, keeps: int | None = None, keep: int = 0
) -> Tensor:
    """Logits ``(tokens, vocab)``, or of the last ``keep``, of one pass of span 0; its first ``keeps`` rows, or all,
    are committed."""
    position = torch.arange(begin, begin + len(ids))[None]
    rows = Rows.clean(position, torch.zeros_like(position))
    logits = runner.run(torch.tensor([list(ids)]), rows, keep or len(ids), plain=plain).logits[0].clone()
    runner.commit(None if keeps is None else [[i < keeps for i in range(len(ids))]])
    return logits
