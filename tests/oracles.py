"""Slow oracles: the row rule as nested loops, written from its table, one un-cached forward under it, and plain loops
over such forwards that write text.

Nothing here knows ``hf_hybrid.core.rows.visible``, the cache, the Runner or a strategy; ``pack`` only lays rows out as
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_hybrid.core import selection
from hf_hybrid.core.acceptance import keyed_noise
from hf_hybrid.core.grammars import PlanState, grammar_of
from hf_hybrid.core.plan import Plan, PlanLimits
from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.core.tokens import ControlTokens
from hf_hybrid.models.host import CACHE


class Row(NamedTuple):
    """One row: its token and what it is."""

    token: int
    position: int
    span: int = 0
    noisy: bool = False
    anchor: int = 0
    block: int = 0


FILLER = Row(token=0, position=0, span=PADDING)


def sees(q: Row, k: Row, reads: dict[int, set[int]]) -> bool:
    """The row rule, cell by cell of its table. ``reads[s]``: the other spans that span s reads, transitively closed."""
    if q.span == PADDING or k.span == PADDING:
        return False
    if k.noisy:
        return q.noisy and q.block == k.block
    if q.span != k.span:
        return k.span in reads.get(q.span, set())
    if q.noisy:
        return k.position < q.anchor
    return k.position <= q.position


def mask(rows: Sequence[Row], reads: dict[int, set[int]]) -> Tensor:
    """bool ``(rows, rows)``, True: the row sees the column. A padding row sees itself, so that no softmax is empty."""
    table = [[i == j or sees(q, k, reads) for j, k in enumerate(rows)] for i, q in enumerate(rows)]
    return torch.tensor(table)


@torch.no_grad()
def forward(model: Any, rows: Sequence[Row], reads: dict[int, set[int]], cache: Any = None) -> Tensor:
    """Logits ``(rows, vocab)`` of one forward over all rows with an explicit mask; ``cache``: an empty one to fill."""
    seen = mask(rows, reads)[None, None]  # (1, 1, rows, rows)
    if model.config._attn_implementation == "eager":
        lowest = torch.finfo(model.dtype).min
        seen = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, lowest)
    return model(
        input_ids=torch.tensor([[r.token for r in rows]]),
        position_ids=torch.tensor([[r.position for r in rows]]),
        attention_mask=seen,
        use_cache=cache is not None,
        **{CACHE: cache},
    ).logits[0]


def pack(batch: Sequence[Sequence[Row]]) -> tuple[Tensor, Rows]:
    """Tokens and rows of one pass, each ``(batch, rows)``; shorter rows are filled up on the left."""
    width = max(len(rows) for rows in batch)
    full = [[FILLER] * (width - len(rows)) + list(rows) for rows in batch]

    def column(index: int) -> Tensor:
        return torch.tensor([[row[index] for row in rows] for rows in full])

    return column(0), Rows(column(1), column(2), column(3), column(4), column(5))


def clean(tokens: Sequence[int], start: int = 0, span: int = 0) -> list[Row]:
    """Clean rows of ``span`` at consecutive positions from ``start``."""
    return [Row(token, start + i, span) for i, token in enumerate(tokens)]


def window(start: int, length: int, span: int = 0, block: int = 0, token: int = 60) -> list[Row]:
    """Noisy rows of ``span`` at consecutive positions from ``start``, which is also their anchor."""
    return [Row(token, start + i, span, True, start, block) for i in range(length)]


def causal(model: Any, rows: Sequence[Row], reads: dict[int, set[int]]) -> Tensor:
    """Logits ``(vocab,)`` behind the last of ``rows``."""
    return forward(model, rows, reads)[-1]


@dataclass(frozen=True)
class Pick:
    """How plain decoding chooses a token: greedily, or with noise keyed by seed, span and position.

    ``warpers`` read the tokens before (``ids``, behind ``padding``) and the scores.
    """

    seed: int | None = None
    warpers: tuple[Any, ...] = ()
    padding: tuple[int, ...] = ()

    def scores(self, logits: Tensor, allowed: Tensor, ids: Sequence[int] = ()) -> Tensor:
        """``(vocab,)``, behind the bans and the processors."""
        scores = logits.masked_fill(~allowed, -torch.inf).unsqueeze(0)  # (1, vocab)
        for warper in self.warpers:
            scores = warper(torch.tensor([[*self.padding, *ids]], dtype=torch.long), scores)
        return scores[0]

    def token(self, scores: Tensor, span: int, position: int) -> int:
        """The token at ``position`` of ``span``."""
        if self.seed is not None:
            scores = scores + keyed_noise(self.seed, [(span << 32) + position], len(scores))[0]
        return int(scores.argmax())


@dataclass(frozen=True)
class Denoising:
    """How an unverified lane of noisy windows settles; the fields are those of ``BlockDiffusionSettings``."""

    window_length: int = 8
    commit: str = "prefix"
    confidence_threshold: float = 0.95
    selection: Any = "confidence"
    max_denoising_steps: int | None = None
    seed: int = 0


def write_plain(
    model: Any,
    context: Sequence[Row],
    own: Sequence[Row],
    reads: dict[int, set[int]],
    allowed: Tensor,
    ends: dict[int, bool],
    limit: int,
    pick: Pick,
) -> list[Row]:
    """``own``, continued token by token with one un-cached forward each: up to ``limit`` more tokens, or to a token of
    ``ends`` (True: it belongs to the text). ``context``: the rows of other spans that this one reads."""
    own = list(own)
    span = own[-1].span
    for _ in range(limit):
        rows = [*context, *own]
        position = own[-1].position + 1
        scores = pick.scores(causal(model, rows, reads), allowed, [row.token for row in rows])
        token = pick.token(scores, span, position)
        if not ends.get(token, True):
            break
        own.append(Row(token, position, span))
        if token in ends:
            break
    return own


def write_noisy(
    model: Any,
    context: Sequence[Row],
    own: Sequence[Row],
    reads: dict[int, set[int]],
    allowed: Tensor,
    ends: dict[int, bool],
    limit: int,
    pick: Pick,
    how: Denoising,
    mask_token: int,
) -> list[Row]:
    """Like ``write_plain``, with windows of noisy rows that nobody checks."""
    own, span = list(own), own[-1].span
    room, fills, fresh = limit, [], True
    while room > 0:
        anchor, size = own[-1].position + 1, min(how.window_length, room + 1)
        fills = fills or [None] * size
        shown = [mask_token if token is None else token for token in fills]
        noisy = [Row(token, anchor + i, span, True, anchor, 1) for i, token in enumerate(shown)]
        logits = forward(model, [*context, *own, *noisy], reads)[-size - 1 :]  # (1 + size, vocab)
        scores = torch.stack([pick.scores(row, allowed) for row in logits])
        first = pick.token(scores[0], span, anchor)  # what the clean row in front of the window says
        tokens = [pick.token(row, span, anchor + i) for i, row in enumerate(scores[1:])]
        settled = _settled(scores[1:], tokens, fills, how, (span << 32) + anchor)
        new: list[int] = []
        if how.commit == "prefix":
            new, fills = [first], []
            if tokens[0] == first:
                new += [t for i, t in enumerate(tokens) if i > 0 and all(settled[1 : i + 1])]
        else:
            fills = [t if old is None and s else old for old, t, s in zip(fills, tokens, settled, strict=True)]
            if fresh:
                fills[0] = first
            stop = next((i for i, t in enumerate(fills) if t in ends), size)
            fills = fills[: stop + 1] + [fills[stop]] * (size - stop - 1) if stop < size else fills
            fresh = None not in fills
            if fresh:
                new, fills = [t for t in fills if t is not None], []
        for token in new:
            if room == 0 or not ends.get(token, True):
                return own
            own.append(Row(token, own[-1].position + 1, span))
            room -= 1
            if token in ends:
                return own
    return own


def _settled(
    scores: Tensor, tokens: Sequence[int], fills: Sequence[int | None], how: Denoising, key: int
) -> list[bool]:
    """Which positions of one window settle: ``core.selection`` on the scores, the schedule as a count. ``key``: of its
    first position, for a random order."""
    size, filled = len(tokens), sum(token is not None for token in fills)
    drawn = [keyed_noise(how.seed ^ 0x5EED, [key + i], 1)[0, 0] for i in range(size)]
    score, _ = selection.scores(scores, how.selection, torch.tensor(tokens), torch.exp(-torch.exp(-torch.stack(drawn))))
    count = None
    if how.max_denoising_steps is not None:
        steps = min(how.max_denoising_steps, size)
        share = math.ceil(size / how.max_denoising_steps)
        if how.commit == "block":  # the first of the evenly spread goals that is not reached yet
            goals = [round(size * step / steps) for step in range(1, steps + 1)]
            share = next(goal for goal in goals if goal > filled) - filled
        count = torch.tensor([share])
    open_ = torch.tensor([[token is None for token in fills]])
    threshold = 2.0 if how.selection == "random" else how.confidence_threshold  # which a random number says nothing of
    return selection.settle(score[None], open_, threshold, count, how.commit == "prefix")[0].tolist()


@dataclass
class Answer:
    """An answer in text order: every new row, and per round the plan and the tokens behind each part's opening."""

    rows: list[Row]
    plans: list[Plan]
    parts: list[list[list[int]]]

    @property
    def ids(self) -> list[int]:
        """New tokens, control tokens included."""
        return [row.token for row in self.rows]


@dataclass
class SlowPlanned:
    """Planned decoding, one part after the other, each written alone behind what it reads.

    ``plans``: given ones. ``how``: parts are written in unverified windows. The other fields are those of
    ``PlannedDiffusionSettings``.
    """

    model: Any
    control: ControlTokens
    plans: Sequence[Plan] = ()
    visibility: str = "dag"
    extension: float = 1.5
    max_parts: int = 16
    max_rounds: int = 8
    max_label_length: int = 16
    pick: Pick = field(default_factory=Pick)
    how: Denoising | None = None

    def write(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """The answer to ``prompt``, cut behind ``max_new_tokens`` tokens, control tokens included."""
        limits = PlanLimits(max_parts=self.max_parts, max_label_length=self.max_label_length)
        self.grammar = grammar_of(self.control, self.model.config.vocab_size, limits)
        self.rows, self.reads = clean([*prompt, *self.grammar.switch]), {0: set[int]()}
        self.answer, self.budget = Answer([], [], []), len(prompt) + max_new_tokens
        while (plan := self._trunk()) is not None:
            self._round(plan)
            if len(self.rows) >= self.budget:
                break
            trunk = max(row.span for row in self.rows) + 1
            self.reads[trunk] = set(range(trunk))
            self.rows += clean(self.grammar.resume, max(row.position for row in self.rows) + 1, trunk)
        self.answer.rows = self.rows[len(prompt) : self.budget]  # cut in text order
        return self.answer

    def _trunk(self) -> Plan | None:
        """Text and the next plan behind the last row; None: the answer ended."""
        number, trunk = len(self.answer.plans), self.rows[-1].span
        if number < len(self.plans):
            plan = self.plans[number]
            self.rows += clean(plan.lead, self.rows[-1].position + 1, trunk)
            self.begin = len(self.rows)
            for part in range(len(plan.spans)):
                entry = self.grammar.render(Plan(plan.spans[: part + 1]))[
                    self._entry_end(plan, part - 1) - self.begin :
                ]
                self.rows += clean(entry, self.rows[-1].position + 1, self._entry_span(trunk, part))
            return plan
        state, lead = PlanState(), list[int]()
        while len(self.rows) < self.budget:
            allowed = self.grammar.allowed(state, not self.plans and number < self.max_rounds)
            scores = causal(self.model, self.rows, self.reads)
            scores = self.pick.scores(scores, allowed, [row.token for row in self.rows])
            position = self.rows[-1].position + 1
            token = self.pick.token(scores, trunk, position)
            if token == self.grammar.plan_end:
                return replace(state.plan, lead=tuple(lead))
            if state.stage == "text" and not self.grammar.opens(token):
                lead.append(token)
            if state.stage == "text" and self.grammar.opens(token):
                self.begin = len(self.rows)
            # A further opening begins an entry that the parts before it do not read.
            entry = len(state.parts) - (state.stage != "label" and not self.grammar.opens(token))
            self.rows.append(Row(token, position, self._entry_span(trunk, max(entry, 0))))
            if token == self.control.noise.end:
                return None
            state = self.grammar.advance(state, token)
        return None

    def _entry_span(self, trunk: int, part: int) -> int:
        """The span of a plan's entry; what it reads: the trunk and the entries before it."""
        if part == 0:
            return trunk
        span = trunk + 2 * part
        self.reads[span] = self.reads[trunk] | {trunk} | {trunk + 2 * before for before in range(1, part)}
        return span

    def _entry_end(self, plan: Plan, part: int) -> int:
        """Number of rows as far as the entry of ``part``."""
        return self.begin + len(self.grammar.render(Plan(plan.spans[: part + 1])))

    def _round(self, plan: Plan) -> None:
        """Every part of ``plan``: the rows of what it reads, its opening, and what follows."""
        allowed = torch.ones(self.model.config.vocab_size, dtype=torch.bool)  # (vocab,), True: allowed in a part
        allowed[[*self.control.noise.banned, self.control.noise.end]] = False
        allowed[self.grammar.part_end] = True
        trunk, ends = self.rows[self.begin].span, {self.grammar.part_end: False}
        used = [self._entry_end(plan, number) for number in range(len(plan.spans))]
        trunk_start, moved = self.rows[self.begin].position, 0
        parts: list[list[int]] = []
        for number, part in enumerate(plan.spans):
            span, named = trunk + 1 + 2 * number, {trunk + 1 + 2 * i for i in part.depends if self.visibility == "dag"}
            known = {trunk, *(trunk + 2 * entry for entry in range(1, number + 1))}
            self.reads[span] = self.reads[trunk].union(known, named, *(self.reads[s] for s in named))
            start = trunk_start + used[number] - self.begin + moved
            own = clean(self.grammar.opening(part), start, span)
            moved += len(own) + part.length  # however long the part becomes
            context = [row for row in self.rows if row.span in self.reads[span]]
            limit = math.ceil(part.length * self.extension)
            arguments = (self.model, context, own, self.reads, allowed, ends, limit, self.pick)
            if part.text is not None:
                written = clean([row.token for row in own] + list(part.text), own[0].position, span)
            else:
                written = (
                    write_noisy(*arguments, self.how, self.control.noise.mask) if self.how else write_plain(*arguments)
                )
            self.rows += written
            kept = max(0, self.budget - len(self.rows) + len(written) - len(own))  # inside the budget
            parts.append([row.token for row in written[len(own) :]][:kept])
        self.answer.plans.append(plan)
        self.answer.parts.append(parts)
