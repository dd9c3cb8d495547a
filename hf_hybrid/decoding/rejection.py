"""Exact rejection: a drafted token is accepted by the probabilities of drafter and model.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, section 2.3 and appendix
A.1. Each sequence draws with noise of its own, keyed by seed and position.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform, reject, sample
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.decoding.drafters.drafter import Draft
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.passes import LaneRows, Pass
from hf_hybrid.decoding.scoring import Scored
from hf_hybrid.decoding.verify import check_best

_ACCEPT, _REDRAW = 0xACCE97, 0x4ED4A3
"""Turn a seed into those of two streams of noise, independent of the one that drafts draw with."""


class Rejection:
    """Checks the drafts of a call.

    Args:
        ends: ids that end an answer.

    Attributes:
        drafts: canvas -> what is drafted for it in the coming pass.
    """

    def __init__(self, ends: Collection[int]):
        self.ends = ends
        self.drafts: dict[Canvas, Draft] = {}
        self._found: tuple[Pass | None, Mapping[LaneRows, list[int]]] = (None, {})

    def check(self, rows: LaneRows, batch: Pass, scored: Scored) -> list[int]:
        """The accepted tokens of a lane, and the one that the model draws behind them."""
        if self._found[0] is not batch:
            every = [r for r in batch.lanes if r.checks and not r.lane.done and r.canvas in self.drafts]
            self._found = (batch, self._check_all(every, batch, scored.processed))
        return self._found[1][rows]

    def _check_all(self, lanes: Sequence[LaneRows], batch: Pass, scores: Tensor) -> dict[LaneRows, list[int]]:
        """For each lane the drafted tokens up to the first rejected one, and the token that takes its place (or that
        follows the last); one operation for all lanes.

        Args:
            scores: of the model ``(active * keep, vocab)``, processed.
        """
        places = [batch.flat(r.line, c) for r in lanes for c in r.checks]
        at = [r.lane.end + i for r in lanes for i in range(len(r.checks))]
        seeds = [r.canvas.seed for r in lanes for _ in r.checks]
        device, vocab = scores.device, scores.shape[-1]
        target = scores[places].softmax(dim=-1)  # (rows, vocab)
        noise = keyed_noise([seed ^ _REDRAW for seed in seeds], at, vocab, device)  # (rows, vocab)
        uniform = keyed_uniform([seed ^ _ACCEPT for seed in seeds], at, device)  # (rows,)
        drafts = [self.drafts[r.canvas] for r in lanes]
        index = [i for i, (r, c) in enumerate((r, c) for r in lanes for c in r.checks) if c != r.checks[-1]]
        tokens = [token for draft in drafts for token in draft.tokens]
        out = sample(target.log(), noise)  # (rows,)
        good = torch.zeros(len(places), dtype=torch.bool, device=device)  # (rows,), True: a drafted token is accepted
        if index:
            drafted = torch.cat([_probabilities(draft, vocab, device) for draft in drafts if draft.tokens])
            given = torch.tensor(tokens, device=device)
            out[index], good[index] = reject(target[index], drafted, given, uniform[index], noise[index])
        chosen, accepted = out.tolist(), good.tolist()
        found: dict[LaneRows, list[int]] = {}
        begin = 0
        for rows in lanes:
            end = begin + len(rows.checks)
            # The last row has no drafted token; nothing is read behind an end.
            stop = next(i for i in range(begin, end) if not accepted[i] or chosen[i] in self.ends)
            found[rows] = chosen[begin : stop + 1]
            begin = end
        return found

    def in_order(
        self,
        rows: LaneRows,
        batch: Pass,
        scored: Scored,
        process: Callable[[Tensor, Tensor], Tensor],
        prefix: Sequence[int],
    ) -> list[int]:
        """The same with processors that need a true prefix: one call per emitted token.

        Args:
            process: history ``(1, length)`` and scores ``(1, vocab)`` to processed scores. prefix: ids up to the last
            settled token.
        """
        lane, draft = rows.lane, self.drafts[rows.canvas]
        places = [batch.flat(rows.line, c) for c in rows.checks]
        at = [lane.end + i for i in range(len(places))]
        device, vocab, seed = scored.raw.device, scored.raw.shape[-1], rows.canvas.seed
        uniform = keyed_uniform(seed ^ _ACCEPT, at, device)  # (1 + draft,)
        noise = keyed_noise(seed ^ _REDRAW, at, vocab, device)  # (1 + draft, vocab)
        drafted = _probabilities(draft, vocab, device)  # (draft, vocab)
        given = torch.tensor(list(draft.tokens), dtype=torch.long, device=device)  # (draft,)
        ids, checked = list(prefix), list[int]()
        for i, place in enumerate(places):
            history = torch.tensor([ids], device=device)  # (1, length)
            scores = process(history, scored.raw[place : place + 1].clone())  # (1, vocab)
            check_best(float(scores.max()))
            rows.in_order.append(scores[0])
            target = scores.softmax(dim=-1)  # (1, vocab)
            one = slice(i, i + 1)
            if i == len(given):
                return [*checked, int(sample(target.log(), noise[one]))]
            out, accepted = reject(target, drafted[one], given[one], uniform[one], noise[one])
            checked.append(int(out))
            if not bool(accepted) or checked[-1] in self.ends:
                break
            ids.append(checked[-1])
        return checked


def _probabilities(draft: Draft, vocab: int, device: torch.device) -> Tensor:
    """What the draft was drawn from, ``(tokens, vocab)``; a draft without probabilities is certain of its tokens."""
    tokens = torch.tensor(list(draft.tokens), dtype=torch.long, device=device)  # (tokens,)
    if draft.probabilities is None:
        return torch.nn.functional.one_hot(tokens, vocab).float()
    given = draft.probabilities.to(device)
    if given.shape != (len(tokens), vocab):
        raise DecodingError(f"probabilities {tuple(given.shape)} of a draft must be ({len(tokens)}, {vocab})")
    drawn = given.gather(-1, tokens.unsqueeze(-1))  # (tokens, 1)
    if bool((given < 0).any()) or not bool(((given.sum(dim=-1) - 1).abs() < 1e-2).all()) or bool((drawn <= 0).any()):
        raise DecodingError(
            "the probabilities of a draft must be what its tokens were drawn from: rows that sum to 1, positive at "
            "the drafted token; or give none"
        )
    return given
