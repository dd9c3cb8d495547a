"""Speculative decoding: a drafter proposes several tokens, the model checks them in one pass.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023. Ours: every batch row
accepts its own number of tokens, and by default a draft stands as far as it equals what plain decoding writes, drawn
with noise keyed by seed and position, so that the text does not depend on the drafter, nor on whether there is one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_hybrid.config import SpeculativeSettings
from hf_hybrid.core.acceptance import keyed_noise, keyed_uniform, reject, sample
from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.decoding.branches import first_branch, plant, rank_of
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.drafters.drafter import Draft, Text
from hf_hybrid.decoding.drafters.self_speculative import SelfDrafter
from hf_hybrid.decoding.drafters.suffix import SuffixDrafter
from hf_hybrid.decoding.drafters.tree import CHAINS
from hf_hybrid.decoding.drafting import NO_DRAFT, Drafting
from hf_hybrid.decoding.output import DecodingError, DraftingReport
from hf_hybrid.decoding.passes import LaneRows, Pass
from hf_hybrid.decoding.recheck import Recheck
from hf_hybrid.decoding.scoring import Scored
from hf_hybrid.decoding.strategy import Strategy, prefix_of
from hf_hybrid.decoding.verify import check_best, path_of

_ACCEPT, _REDRAW = 0xACCE97, 0x4ED4A3
"""Turn a seed into those of two streams of noise, independent of the one that drafts draw with."""


class Speculative(Strategy):
    """One trunk; a drafter writes its draft before every pass."""

    def __init__(self, context: Context):
        super().__init__(context)
        settings = context.call.settings
        assert isinstance(settings, SpeculativeSettings)
        self.settings = settings
        self.rejecting = context.sampling and settings.acceptance == "rejection"
        self.drafting = Drafting(context, settings, self.rejecting)
        self.drafter = self.drafting.drafter
        self.texts: dict[int, Text] = {}
        self.branches: dict[int, list[int]] = {}  # canvas -> spans that branches of its drafts use
        self.trials: dict[int, Draft] = {}  # canvas -> its draft in the coming pass
        # Stateful processors are called once per emitted token, and rejection draws: neither can decide a token twice.
        certain = self.rejecting or context.processors.needs_prefix
        self.recheck = Recheck(0.0 if certain else settings.recheck_margin, context.runner.dtype)
        self._alone = False  # True: the last pass had no drafts and windows, for a token in doubt
        self.written = 0  # tokens that the present pass settles, over all lanes
        self._rejected: tuple[Pass | None, dict[LaneRows, list[int]]] = (None, {})
        self._chained = False  # True: trees were drafted, and rejection checked their first branches

    # The lane.

    def begin(self, canvas: Canvas, line: int) -> None:
        """One lane: the prompt."""
        trunk = Lane("trunk", canvas.new_span(), 0, list(canvas.prompt), limit=len(canvas.prompt) + canvas.budget)
        trunk.positions = canvas.positions
        trunk.window = self.drafting.window
        canvas.lanes.append(trunk)
        text = Text(canvas.row, trunk.tokens, len(canvas.prompt), seed=canvas.seed)
        self.texts[canvas.row] = text
        self.reports[canvas.row].drafting = DraftingReport(self.drafting.name)
        if min(canvas.prompt) < 0 and not isinstance(self.drafter, SuffixDrafter | SelfDrafter):
            raise DecodingError(
                f"{self.drafting.name} reads the ids of the prompt, and some are given as vectors or lie in a cache "
                "alone; use drafter='suffix', or pass the whole text as input_ids"
            )
        self.drafting.begin(text)

    def settled(self, canvas: Canvas, lane: Lane, tokens: list[int], line: int) -> None:
        """The answer ends with its lane."""
        canvas.finished = lane.done

    def stage(self, canvas: Canvas) -> str:
        """``verify`` in a pass that checks a draft, else ``text``."""
        return "verify" if canvas.lanes[0].draft else "text"

    def finished(self, canvas: Canvas) -> None:
        """The drafter may keep the text."""
        self.drafter.end(self.texts.pop(canvas.row))
        if note := self.drafter.note or (CHAINS if self._chained else ""):
            self.reports[canvas.row].fallbacks.append(note)
        if self.drafting.broken:
            self.reports[canvas.row].fallbacks.append(f"drafting was switched off: {self.drafting.broken}")

    def release(self) -> None:
        """Another call may have the drafter."""
        self.drafting.close()

    def forget(self, canvas: Canvas) -> None:
        """What was accepted of its drafts too."""
        super().forget(canvas)
        self.drafting.forget(canvas.row)
        self.trials.pop(canvas.row, None)
        self.branches.pop(canvas.row, None)
        self.recheck.waiting.discard(canvas.row)

    # Drafting.

    def draft(self, canvas: Canvas, lane: Lane, proposed: list[int]) -> list[int]:
        """None yet: drafts of all lanes are made together, before the next pass."""
        if isinstance(self.drafter, SelfDrafter):
            self.drafter.offer(canvas.row, proposed)
        return []

    def prepare(self, canvases: list[Canvas], first: int) -> None:
        """Ask the drafter, and put on trial what is expected to pay."""
        started = time.perf_counter()
        self.written = 0
        lanes = [canvas.lanes[0] for canvas in canvases]
        waiting = self.recheck.waiting & {canvas.row for canvas in canvases}
        if waiting:
            self._decide_alone(canvases, waiting)
            return
        texts = [self.texts[canvas.row] for canvas in canvases]
        for text, lane in zip(texts, lanes, strict=True):
            if self._alone:
                lane.window = self.drafting.window
            text.room = max(0, lane.limit - len(lane.tokens) - 1)  # the pass itself writes one more
            text.room = min(text.room, self._behind(lane))
        self._alone = False
        drafts, length = self.drafting.ask(texts, [len(lane.pending) + lane.open_length for lane in lanes])
        for line, (canvas, text, draft) in enumerate(zip(canvases, texts, drafts, strict=True), first):
            lane, trial = canvas.lanes[0], self._trial(canvas, text, draft, length)
            self.trials[canvas.row] = trial
            lane.draft = list(trial.tokens)
            report = self.reports[canvas.row].drafting
            assert report is not None
            if trial.parents is not None:
                plant(self.runner, canvas, line, lane, trial.parents, self.branches.setdefault(canvas.row, []))
                report.trees += 1
            if not trial.tokens:
                had = len(draft.tokens) > 0 or self.drafter.costly or lane.window < self.drafting.window
                off = length == 0 and text.room > 0 and had and not self.drafting.broken
                report.off, report.empty = report.off + off, report.empty + (not off)
            report.probes += self.drafting.probing and bool(trial.tokens)
        if self.drafting.window and self.drafting.adaptive:
            window = self.drafting.window if self.drafting.window_pays(len(lanes)) else 0
            for lane in lanes:
                lane.window = window
        for lane in lanes:
            lane.window = lane.window if len(lane.draft) + lane.window <= self._behind(lane) else 0
        seconds = time.perf_counter() - started
        for canvas in canvases:
            spent = self.reports[canvas.row].seconds
            spent["draft"] = spent.get("draft", 0.0) + seconds

    def _behind(self, lane: Lane) -> int:
        """Rows that may stand behind the last settled token without changing its rotary factors."""
        switch = self.context.switch
        room = switch.room(len(lane.tokens)) if switch is not None else None
        return 1 << 30 if room is None else room

    def _decide_alone(self, canvases: list[Canvas], waiting: set[int]) -> None:
        """A pass without drafts and windows, of the shape that plain decoding has."""
        self.drafting.rest()
        self._alone = True
        for canvas in canvases:
            canvas.lanes[0].window = 0
            self.trials[canvas.row] = NO_DRAFT
            report = self.reports[canvas.row].drafting
            assert report is not None
            alone = canvas.row in waiting
            report.rechecked, report.empty = report.rechecked + alone, report.empty + (not alone)
        self.recheck.waiting -= waiting

    def _trial(self, canvas: Canvas, text: Text, draft: Draft, length: int) -> Draft:
        """``draft`` as far as it can be of use, checked."""
        if draft.parents is not None:
            self._chained = self.rejecting
            width = self.context.vocab_size
            draft = first_branch(draft, width) if self.rejecting else self.drafting.pruned(draft, length, text.room)
        if draft.parents is not None:
            return draft
        tokens = list(draft.tokens[: min(length, self.settings.draft_length, text.room)])
        sampled = self.rejecting and draft.probabilities is not None
        if not sampled:  # a draft that was drawn by chance must not be cut by what was drawn
            tokens = super().draft(canvas, canvas.lanes[0], tokens)
        probabilities = draft.probabilities[: len(tokens)] if sampled and draft.probabilities is not None else None
        return Draft(tokens, probabilities, draft.grade, draft.chance)

    # What became of it.

    def tried(self, canvas: Canvas, lane: Lane, stand: int, checked: list[int]) -> None:
        """Tell the drafter, and count."""
        trial, text = self.trials[canvas.row], self.texts[canvas.row]
        self.written += min(stand + 1, len(checked))
        report = self.reports[canvas.row].drafting
        assert report is not None
        report.passes.append((len(trial.tokens), stand, min(stand + 1, len(checked))))
        # Of a draft that was cut in front of a token in doubt nothing is known behind what stands.
        doubted = canvas.row in self.recheck.waiting
        if trial.parents is not None:
            trial = self._tree_tried(canvas, trial, trial.parents, checked, doubted)
        elif trial.tokens:
            ended = trial.tokens[stand : stand + 1] == checked[stand : stand + 1]  # nor behind an end that was drafted
            length = stand if doubted or ended else len(trial.tokens)
            report.note(length, stand)
            self.drafting.note(canvas.row, trial.grade, length, stand)
        if checked and not self.drafting.broken:
            self.drafter.learn(text, trial, stand, checked)

    def _tree_tried(
        self, canvas: Canvas, trial: Draft, parents: Sequence[int], checked: list[int], doubted: bool
    ) -> Draft:
        """Count what stood of a tree; the branch that stands, as a chain."""
        path = path_of(parents, trial.tokens, checked)
        nodes = [-1, *path]
        for place, node in enumerate(nodes[:-1] if doubted else nodes):
            for child in (i for i, parent in enumerate(parents) if parent == node):
                grade = rank_of(trial, trial.ranks[child]).grade
                self.drafting.note_one(canvas.row, grade, place, child in path)
        report = self.reports[canvas.row].drafting
        assert report is not None
        report.note(len(path) + (nodes[-1] in parents and not doubted), len(path))
        return Draft([trial.tokens[node] for node in path], None, trial.grade, trial.chance)

    def measured(self, canvases: list[Canvas], batch: Pass, seconds: float) -> None:
        """Note what the pass cost. Prompts are left out: they are longer, and the first pass is slow."""
        if not all(canvas.num_forwards for canvas in canvases):
            return
        active, width = batch.tokens.shape
        self.drafting.measured(active, active * width, self.written / max(len(batch.lanes), 1), seconds)

    # Exact rejection.

    def check(self, rows: LaneRows, batch: Pass, scored: Scored) -> list[int]:
        """By equality; with ``acceptance="rejection"`` by the probabilities of drafter and model."""
        if not self.rejecting:
            return self.recheck.cut(rows, batch, scored, super().check(rows, batch, scored))
        if self.context.processors.needs_prefix:
            return self._reject_in_order(rows, batch, scored)
        if self._rejected[0] is not batch:
            every = [r for r in batch.lanes if r.checks and not r.lane.done]
            self._rejected = (batch, self._reject_all(every, batch, scored.processed))
        return self._rejected[1][rows]

    def _reject_all(self, lanes: Sequence[LaneRows], batch: Pass, scores: Tensor) -> dict[LaneRows, list[int]]:
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
        trials = [self.trials[r.canvas.row] for r in lanes]
        index = [i for i, (r, c) in enumerate((r, c) for r in lanes for c in r.checks) if c != r.checks[-1]]
        tokens = [token for trial in trials for token in trial.tokens]
        out = sample(target.log(), noise)  # (rows,)
        good = torch.zeros(len(places), dtype=torch.bool, device=device)  # (rows,), True: a drafted token stands
        if index:
            drafted = torch.cat([_probabilities(trial, vocab, device) for trial in trials if trial.tokens])
            given = torch.tensor(tokens, device=device)
            out[index], good[index] = reject(target[index], drafted, given, uniform[index], noise[index])
        chosen, stands = out.tolist(), good.tolist()
        found: dict[LaneRows, list[int]] = {}
        begin = 0
        for rows in lanes:
            end = begin + len(rows.checks)
            # The last row has no drafted token; nothing is read behind an end.
            stop = next(i for i in range(begin, end) if not stands[i] or chosen[i] in self.context.ends)
            found[rows] = chosen[begin : stop + 1]
            begin = end
        return found

    def _reject_in_order(self, rows: LaneRows, batch: Pass, scored: Scored) -> list[int]:
        """The same for one lane, with processors that need a true prefix: one call per emitted token."""
        lane, draft = rows.lane, self.trials[rows.canvas.row]
        places = [batch.flat(rows.line, c) for c in rows.checks]
        at = [lane.end + i for i in range(len(places))]
        device, vocab, seed = scored.raw.device, scored.raw.shape[-1], rows.canvas.seed
        uniform = keyed_uniform(seed ^ _ACCEPT, at, device)  # (1 + draft,)
        noise = keyed_noise(seed ^ _REDRAW, at, vocab, device)  # (1 + draft, vocab)
        drafted = _probabilities(draft, vocab, device)  # (draft, vocab)
        given = torch.tensor(list(draft.tokens), dtype=torch.long, device=device)  # (draft,)
        process, ids = self.process_in_order(rows), prefix_of(rows.canvas, lane)
        checked: list[int] = []
        for i, place in enumerate(places):
            history = torch.tensor([ids], device=device)  # (1, length)
            scores = process(history, scored.raw[place : place + 1].clone())  # (1, vocab)
            check_best(float(scores.max()))
            rows.in_order.append(scores[0])
            target = scores.softmax(dim=-1)  # (1, vocab)
            one = slice(i, i + 1)
            if i == len(given):
                return [*checked, int(sample(target.log(), noise[one]))]
            out, stands = reject(target, drafted[one], given[one], uniform[one], noise[one])
            checked.append(int(out))
            if not bool(stands) or checked[-1] in self.context.ends:
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
