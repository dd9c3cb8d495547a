"""Speculative decoding: a drafter proposes several tokens, the model checks them in one pass.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023. Ours: every sequence
accepts its own number of tokens, and by default a draft is accepted as far as it equals what plain decoding writes,
drawn with noise keyed by seed and position, so that the text does not depend on the drafter, nor on whether there is
one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hf_hybrid.config import Settings, SpeculativeSettings
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.lane import AcceptRule, Lane, Window
from hf_hybrid.decoding.branches import first_branch, plant, rank_of
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.drafters.drafter import Draft, Text
from hf_hybrid.decoding.drafters.self_speculative import SelfDrafter
from hf_hybrid.decoding.drafters.suffix import SuffixDrafter
from hf_hybrid.decoding.drafters.tree import CHAINS, ONE_BRANCH
from hf_hybrid.decoding.drafting import NO_DRAFT, Drafting
from hf_hybrid.decoding.output import DecodingError, DraftingReport, GenerationReport
from hf_hybrid.decoding.passes import LaneRows, Pass
from hf_hybrid.decoding.recheck import Recheck
from hf_hybrid.decoding.rejection import Rejection
from hf_hybrid.decoding.scoring import Scored
from hf_hybrid.decoding.verify import path_of
from hf_hybrid.decoding.writer import Shared, Writer


class Speculation(Shared):
    """The drafter of a call, asked for drafts of all answers together, and how drafts are accepted."""

    def __init__(self, context: Context, settings: Settings):
        assert isinstance(settings, SpeculativeSettings)
        self.context, self.runner, self.settings = context, context.runner, settings
        rejecting = context.sampling and settings.acceptance == "rejection"
        self.rejection = Rejection(context.ends) if rejecting else None
        self.drafting = Drafting(context, settings, rejecting)
        self.drafter = self.drafting.drafter
        self.rule = AcceptRule(draft_threshold=settings.draft_threshold)
        # Stateful processors are called once per emitted token, and rejection draws: neither can decide a token twice.
        certain = rejecting or context.processors.needs_prefix
        self.recheck = Recheck(0.0 if certain else settings.recheck_margin, context.runner.dtype)
        self._alone = False  # True: the last pass had no drafts and windows, for a token in doubt
        self.written = 0  # tokens that the present pass settles, over all lanes
        self.chained = False  # True: trees were drafted, and their first branches checked alone

    def prepare(self, writers: Sequence[Speculative]) -> None:
        """Ask the drafter, and draft as much as is expected to pay."""
        started = time.perf_counter()
        self.written = 0
        waiting = self.recheck.waiting & {writer.canvas.index for writer in writers}
        if waiting:
            self._decide_alone(writers, waiting)
            return
        for writer in writers:
            writer.make_room(self.drafting.window if self._alone else None)
        self._alone = False
        clean = [len(w.lane.pending) + w.lane.open_length for w in writers]
        drafts, length = self.drafting.ask([writer.text for writer in writers], clean)
        for writer, draft in zip(writers, drafts, strict=True):
            writer.take(draft, length)
        if self.drafting.window and self.drafting.adaptive:
            window = self.drafting.window if self.drafting.window_pays(len(writers)) else 0
            for writer in writers:
                writer.lane.window.length = window
        for writer in writers:
            writer.keep_factors()
        seconds = time.perf_counter() - started
        for writer in writers:
            spent = writer.report.seconds
            spent["draft"] = spent.get("draft", 0.0) + seconds

    def _decide_alone(self, writers: Sequence[Speculative], waiting: set[int]) -> None:
        """A pass without drafts and windows, of the shape that plain decoding has."""
        self.drafting.rest()
        self._alone = True
        for writer in writers:
            writer.lane.window.length = 0
            writer.draft_in_check = NO_DRAFT
            alone = writer.canvas.index in waiting
            writer.drafted.rechecked, writer.drafted.empty = (
                writer.drafted.rechecked + alone,
                writer.drafted.empty + (not alone),
            )
        self.recheck.waiting -= waiting

    def behind(self, lane: Lane) -> int:
        """Rows that may follow the last settled token without changing its rotary factors."""
        switch = self.context.switch
        room = switch.room(len(lane.tokens)) if switch is not None else None
        return 1 << 30 if room is None else room

    def measured(self, writers: Sequence[Writer], batch: Pass, seconds: float) -> None:
        """Note what the pass cost. Prompts are left out: they are longer, and the first pass is slow."""
        if not all(writer.canvas.num_forwards for writer in writers):
            return
        active, width = batch.tokens.shape
        self.drafting.measured(active, active * width, self.written / max(len(batch.lanes), 1), seconds)

    def close(self) -> None:
        """Another call may have the drafter."""
        self.drafting.close()


class Speculative(Writer):
    """One trunk; a drafter writes its draft before every pass."""

    shared: Speculation

    def __init__(self, context: Context, shared: Speculation, canvas: Canvas, report: GenerationReport):
        super().__init__(context, shared, canvas, report)
        self.drafted = report.drafting = DraftingReport(shared.drafting.name)
        self.draft_in_check = NO_DRAFT
        self._spans: list[int] = []  # that branches of its drafts use

    @classmethod
    def share(cls, context: Context, settings: Settings) -> Speculation:
        """See ``Writer.share``."""
        return Speculation(context, settings)

    @property
    def lane(self) -> Lane:
        """The one that it has."""
        return self.canvas.lanes[0]

    def take_over(self, trunk: Lane) -> None:
        """The drafter reads its text from now on."""
        canvas, shared = self.canvas, self.shared
        trunk.rule, trunk.window = shared.rule, Window(shared.drafting.window)
        self.text = Text(canvas.index, trunk.tokens, len(canvas.prompt), seed=canvas.seed)
        if min(canvas.prompt) < 0 and not isinstance(shared.drafter, SuffixDrafter | SelfDrafter):
            raise DecodingError(
                f"{shared.drafting.name} reads the ids of the prompt, and some are given as vectors or lie in a cache "
                "alone; use drafter='suffix', or pass the whole text as input_ids"
            )
        shared.drafting.begin(self.text)

    def settled(self, lane: Lane, tokens: list[int]) -> None:
        """The answer ends with its lane."""
        self.canvas.finished = lane.done

    def stage(self) -> str:
        """``verify`` in a pass that checks a draft, else ``text``."""
        return "verify" if self.lane.drafted.tokens else "text"

    def finished(self) -> None:
        """The drafter may keep the text; what was accepted of its drafts is forgotten."""
        shared, drafting, index = self.shared, self.shared.drafting, self.canvas.index
        shared.drafter.end(self.text)
        if note := shared.drafter.note or ((CHAINS if shared.rejection else ONE_BRANCH) if shared.chained else ""):
            self.report.fallbacks.append(note)
        if drafting.broken:
            self.report.fallbacks.append(f"drafting was switched off: {drafting.broken}")
        drafting.forget(index)
        shared.recheck.waiting.discard(index)
        if shared.rejection is not None:
            shared.rejection.drafts.pop(self.canvas, None)

    # Drafting.

    def draft(self, lane: Lane, proposed: list[int]) -> list[int]:
        """None yet: drafts of all lanes are made together, before the next pass."""
        if isinstance(self.shared.drafter, SelfDrafter):
            self.shared.drafter.offer(self.canvas.index, proposed)
        return []

    def make_room(self, window: int | None) -> None:
        """Say how much may be drafted; ``window``: to open again, None: as it is."""
        lane = self.lane
        if window is not None:
            lane.window.length = window
        self.text.room = max(0, lane.bounds.limit - len(lane.tokens) - 1)  # the pass itself writes one more
        self.text.room = min(self.text.room, self.shared.behind(lane))

    def take(self, draft: Draft, length: int) -> None:
        """Draft what can be of use of ``draft``, at most ``length`` tokens of a chain."""
        drafting, lane, report = self.shared.drafting, self.lane, self.drafted
        useful = self.draft_in_check = self._useful(draft, length)
        if self.shared.rejection is not None:
            self.shared.rejection.drafts[self.canvas] = useful
        lane.drafted.tokens = list(useful.tokens)
        if useful.parents is not None:
            plant(self.context.runner, self.canvas, lane, useful.parents, self._spans)
            report.trees += 1
        if not useful.tokens:
            had = len(draft.tokens) > 0 or self.shared.drafter.costly or lane.window.length < drafting.window
            off = length == 0 and self.text.room > 0 and had and not drafting.broken
            report.off, report.empty = report.off + off, report.empty + (not off)
        report.probes += drafting.probing and bool(useful.tokens)

    def keep_factors(self) -> None:
        """No window where it would change the rotary factors of the pass."""
        lane = self.lane
        if len(lane.drafted.tokens) + lane.window.length > self.shared.behind(lane):
            lane.window.length = 0

    def _useful(self, draft: Draft, length: int) -> Draft:
        """``draft`` as far as it can be of use, checked."""
        shared = self.shared
        if draft.parents is not None:
            alone = not self.context.runner.abilities.branches
            shared.chained = alone or shared.rejection is not None
            if shared.chained:
                draft = first_branch(draft, self.context.vocab_size)
            else:
                draft = shared.drafting.pruned(draft, length, self.text.room)
        if draft.parents is not None:
            return draft
        tokens = list(draft.tokens[: min(length, shared.settings.draft_length, self.text.room)])
        sampled = shared.rejection is not None and draft.probabilities is not None
        if not sampled:  # a draft that was drawn by chance must not be cut by what was drawn
            tokens = super().draft(self.lane, tokens)
        probabilities = draft.probabilities[: len(tokens)] if sampled and draft.probabilities is not None else None
        return Draft(tokens, probabilities, draft.bucket, draft.chance)

    # What became of it.

    def check(self, rows: LaneRows, batch: Pass, scored: Scored) -> list[int]:
        """By equality; with ``acceptance="rejection"`` by the probabilities of drafter and model."""
        shared = self.shared
        if shared.rejection is None:
            return shared.recheck.cut(rows, batch, scored, super().check(rows, batch, scored))
        if self.context.processors.needs_prefix:
            process, prefix = self.process_in_order(rows), self.prefix_of(rows.lane)
            return shared.rejection.in_order(rows, batch, scored, process, prefix)
        return shared.rejection.check(rows, batch, scored)

    def accepted(self, lane: Lane, count: int, checked: list[int]) -> None:
        """Tell the drafter, and count."""
        shared, draft = self.shared, self.draft_in_check
        written = min(count + 1, len(checked))
        shared.written += written
        self.drafted.passes.append((len(draft.tokens), count, written))
        # Of a draft that was cut in front of a token in doubt nothing is known behind what was accepted.
        doubted = self.canvas.index in shared.recheck.waiting
        if draft.parents is not None:
            draft = self._tree_accepted(draft, draft.parents, checked, doubted)
        elif draft.tokens:
            ended = draft.tokens[count : count + 1] == checked[count : count + 1]  # nor behind an end that was drafted
            length = count if doubted or ended else len(draft.tokens)
            self.drafted.note(length, count)
            shared.drafting.note(self.canvas.index, draft.bucket, length, count)
        if checked and not shared.drafting.broken:
            shared.drafter.learn(self.text, draft, count, checked)

    def _tree_accepted(self, draft: Draft, parents: Sequence[int], checked: list[int], doubted: bool) -> Draft:
        """Count what was accepted of a tree; the accepted branch, as a chain."""
        path = path_of(parents, draft.tokens, checked)
        nodes = [-1, *path]
        for depth, node in enumerate(nodes[:-1] if doubted else nodes):
            for child in (i for i, parent in enumerate(parents) if parent == node):
                bucket = rank_of(draft, draft.ranks[child]).bucket
                self.shared.drafting.note_one(self.canvas.index, bucket, depth, child in path)
        self.drafted.note(len(path) + (nodes[-1] in parents and not doubted), len(path))
        return Draft([draft.tokens[node] for node in path], None, draft.bucket, draft.chance)
