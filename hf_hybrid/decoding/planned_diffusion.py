"""Planned diffusion: an autoregressive plan names the parts and their lengths, then all parts are written at once.

Source: Israel et al., "Planned Diffusion", 2025, section 3; lanes that finish at their own time as in Jin et al.,
"Learning to Keep a Promise" (PASTA), 2025. Ours: lengths are tokens of their own, parts may depend on earlier parts,
text may stand before, between and behind rounds, a part may outgrow its plan, and by default every drafted token is
checked by the clean rows of the next pass, so that the text equals ``span_decoding="autoregressive"``.

The trunk is a chain of lanes, one per segment: the prompt with the switch ``<par>``, and each ``<sync/>`` with what
follows it. Between two segments stand the lanes of a round. A part reads the trunk as far as its own entry of the
plan, so it begins when that entry stands, beside the rest of the plan: every further entry is a span of its own (in one
lane), which the parts before it do not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from hf_hybrid.config import PlannedDiffusionSettings
from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.core.plan import ControlTokens, Plan, PlanGrammar, PlanState
from hf_hybrid.decoding.output import DecodingError, SpanReport
from hf_hybrid.decoding.strategy import Context, Strategy


@dataclass(eq=False)
class Round:
    """A round that has begun.

    Attributes:
        trunk: the lane that holds its plan. begin: index of the plan's first token there. plan: as far as it stands.
        lanes: of the parts that have begun (a dense round: its one canvas until that is full). whole: True: the plan is
        complete.
    """

    trunk: Lane
    begin: int
    plan: Plan
    lanes: list[Lane] = field(default_factory=list[Lane])
    whole: bool = False


class PlannedDiffusion(Strategy):
    """Rounds of a plan and its spans on one trunk."""

    def __init__(self, context: Context):
        super().__init__(context)
        settings, control = context.call.settings, context.call.control
        assert isinstance(settings, PlannedDiffusionSettings)
        if control is None:
            raise DecodingError(
                "planned_diffusion needs control tokens, and the model has none; add them with "
                "hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"
            )
        diffusing = settings.span_decoding == "diffusion"
        if settings.commit == "block" and settings.verify_spans and diffusing and settings.visibility != "dense":
            raise DecodingError("commit='block' keeps a block noisy, so nothing can be checked; add verify_spans=False")
        self.settings = settings
        self.control: ControlTokens = control
        self.grammar = PlanGrammar(control, context.vocab_size, settings.limits)
        self.given = self._check_plans(context.call.plan)
        self.window = settings.window_length if diffusing else 0
        self.states: dict[Lane, PlanState] = {}
        self.rounds: dict[int, list[Round]] = {}
        self.in_span = tuple({*control.banned, *context.ends} - {control.spad})
        self.lengths = frozenset(token for _, token in control.lengths)
        self.in_canvas = (control.mask, control.par, control.sync)

    # The trunk.

    def begin(self, canvas: Canvas, line: int) -> None:
        """The prompt and the switch, and an optimistic first ``<topic>``."""
        self.rounds[canvas.row] = []
        shortest = self.control.lengths[0][0]
        span = canvas.new_span()
        limit = len(canvas.prompt) + canvas.budget
        if not self.given and canvas.budget < shortest + 8:
            trunk = Lane("trunk", span, 0, list(canvas.prompt), limit=limit)
            self.reports[canvas.row].fallbacks.append("no plan: max_new_tokens leaves no room for a part")
            self.states[trunk] = PlanState()
            canvas.lanes.append(trunk)
            return
        first = len(canvas.prompt)
        trunk = Lane("trunk", span, 0, [*canvas.prompt, self.control.par], limit=limit, hidden=[(first, first + 1)])
        canvas.lanes.append(trunk)
        self._open_segment(canvas, trunk, line)

    def _open_segment(self, canvas: Canvas, trunk: Lane, line: int) -> None:
        """A new trunk segment: with a given plan its tokens are forced, else the model writes."""
        self.states[trunk] = PlanState()
        number = len(self.rounds[canvas.row])
        if number < len(self.given):
            plan = self.given[number]
            forced = [*plan.lead, *plan.render(self.control)]
            bodies = (s.length if s.text is None else len(s.text) for s in plan.spans)
            needed = len(forced) + sum(s.opening for s in plan.spans) + sum(bodies)
            if needed > canvas.budget - canvas.num_new:
                raise DecodingError(
                    f"the given plan needs {needed} tokens and max_new_tokens leaves "
                    f"{canvas.budget - canvas.num_new}; raise it"
                )
            begin = len(trunk.tokens) + len(plan.lead)
            trunk.hidden.append((begin, len(trunk.tokens) + len(forced)))
            trunk.tokens += forced
            if self.settings.visibility != "dense":
                trunk.breaks = [begin + size for size in accumulate(span.entry for span in plan.spans[:-1])]
            trunk.finish("end")
            self._carry_out(canvas, trunk, begin, plan, line, whole=True)
            return
        trunk.window = self.settings.plan_window
        trunk.draft = self.draft(canvas, trunk, [])

    def allowed(self, canvas: Canvas, lane: Lane, draft: list[int]) -> list[Tensor | None]:
        """The plan grammar behind every trunk token, settled or drafted; spans are free but for ``forbidden``."""
        if lane.kind != "trunk":
            return [None] * (1 + len(draft))
        state, masks = self.states[lane], []
        for token in (*draft, None):
            masks.append(self.grammar.allowed(state, self._rounds_left(canvas), self._room(canvas, len(masks))))
            if token is not None:
                state = self.grammar.advance(state, token)
        return masks

    def forbidden(self, lane: Lane) -> tuple[int, ...]:
        """Spans hold text and end in ``<spad>``; windows over the trunk may propose a plan."""
        if lane.kind == "trunk":
            return self.in_canvas if lane.window else ()
        return self.in_span

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """A span ends with its first ``<spad>``, a plan with ``<async>``, which opens one, the answer with ``eos``."""
        if lane.kind == "trunk":
            return {**super().terminators(lane), self.control.async_: False}
        # In a dense round <spad> ends its part alone; the lane ends when it is full.
        return {} if lane.kind == "canvas" else {self.control.spad: False}

    def draft(self, canvas: Canvas, lane: Lane, proposed: list[int]) -> list[int]:
        """Proposals as far as the grammar allows them; without any, an optimistic ``<topic>`` where one may follow."""
        drafted = super().draft(canvas, lane, proposed)
        if lane.kind != "trunk":
            return drafted
        state, legal = self.states[lane], []
        self._forget_breaks(lane, len(lane.tokens))
        for token in drafted:
            text, control = self.grammar.choices(state, self._rounds_left(canvas), self._room(canvas, len(legal)))
            special = token in self.control.banned or token in self.context.ends
            if not (token in control if special else text):
                break
            state = self._follow(lane, state, token, len(lane.tokens) + len(legal))
            legal.append(token)
        lane.ending = lane.ending and len(legal) == len(drafted)
        fresh = self._fresh(canvas, lane) and not lane.window
        if not (legal or lane.ending) and (self.states[lane].stage == "length" or fresh):
            _, control = self.grammar.choices(self.states[lane], self._rounds_left(canvas), self._room(canvas, 0))
            if self.control.topic in control:
                legal = [self.control.topic]
                self._follow(lane, self.states[lane], self.control.topic, len(lane.tokens))
        return legal

    def guesses(self, lane: Lane) -> frozenset[int]:
        """A planned length is a guess, which seldom changes the labels behind it."""
        return self.lengths if lane.kind == "trunk" else frozenset()

    def settled(self, canvas: Canvas, lane: Lane, tokens: list[int], line: int) -> None:
        """Follow the grammar on the trunk, report finished spans, and start what comes next."""
        if lane.kind == "trunk":
            self._trunk_settled(canvas, lane, tokens, line)
        elif lane.done:
            if lane.kind == "canvas":
                self._split_canvas(canvas, lane)
            self._span_finished(canvas, line)

    def _trunk_settled(self, canvas: Canvas, lane: Lane, tokens: list[int], line: int) -> None:
        state, first = self.states[lane], len(lane.tokens) - len(tokens)
        self._forget_breaks(lane, first)
        for number, token in enumerate(tokens, first):
            if token == self.control.topic and state.stage == "text":
                lane.hidden.append((number, 1 << 40))
            if token not in self.context.ends:
                state = self._follow(lane, state, token, number)
        while not lane.done:  # where the grammar leaves one choice, no pass is spent
            text, control = self.grammar.choices(state, self._rounds_left(canvas), self._room(canvas, 0))
            if text or len(control) != 1:
                break
            lane.settle(control, self.terminators(lane))
            state = state if lane.done else self._follow(lane, state, control[0], len(lane.tokens) - 1)
        self.states[lane] = state
        whole = lane.done and lane.reason == "end" and state.stage == "length"
        if whole:
            self._note_room(canvas, state)
        if lane.done and not whole:
            canvas.finished = True
        elif state.stage != "text":
            begin = lane.hidden[-1][0]
            # Behind the prompt and <par>, or behind <sync/>, up to the plan.
            lead = tuple(lane.tokens[lane.hidden[0][1] : begin])
            complete = state.parts if whole else state.parts[: state.complete]
            self._carry_out(canvas, lane, begin, Plan(complete, lead), line, whole)

    def _follow(self, trunk: Lane, state: PlanState, token: int, index: int) -> PlanState:
        """The state behind ``token``, which stands (or is on trial) at ``index``; notes where an entry begins."""
        if token == self.control.topic and state.stage == "length" and self.settings.visibility != "dense":
            trunk.breaks.append(index)
        return self.grammar.advance(state, token)

    def _forget_breaks(self, trunk: Lane, index: int) -> None:
        """Entries that begin at ``index`` or later were on trial."""
        trunk.breaks = [at for at in trunk.breaks if at < index]

    def _reserve(self, trunk: Lane, line: int) -> None:
        """A span for every entry that begins in its tokens or in its draft. Parts take the ids between them
        (`hf_hybrid.training.layout`)."""
        while len(trunk.segments) < len(trunk.breaks):
            span = trunk.span + 2 * (len(trunk.segments) + 1)
            self.runner.relate(line, span, [*trunk.sees, trunk.span, *trunk.segments])
            trunk.segments.append(span)

    # Rounds.

    def _carry_out(self, canvas: Canvas, trunk: Lane, begin: int, plan: Plan, line: int, whole: bool) -> None:
        """Lanes for the parts of ``plan``, which stands at ``trunk.tokens[begin:]``; ``whole``: no part will follow.

        Each may outgrow its plan; the sum is cut in text order, if it must be. Parts whose text is given are finished;
        their rows ride in the next pass.
        """
        rounds, dense = self.rounds[canvas.row], self.settings.visibility == "dense"
        if not plan.spans or (dense and not whole):
            return
        if not rounds or rounds[-1].trunk is not trunk:
            rounds.append(Round(trunk, begin, plan))
        current = rounds[-1]
        current.plan, current.whole = plan, whole
        if dense:
            current.lanes.append(self._dense_lane(canvas, trunk, plan, list(range(canvas.num_spans)), line))
        else:
            self._reserve(trunk, line)
            self._start_parts(canvas, current, line)
        if whole:
            self.reports[canvas.row].plans.append(plan)
            self._span_finished(canvas, line)

    def _start_parts(self, canvas: Canvas, current: Round, line: int) -> None:
        """Lanes for the parts of the plan that have none."""
        settings, control, trunk, plan, lanes = self.settings, self.control, current.trunk, current.plan, current.lanes
        if len(lanes) == len(plan.spans):
            return
        related = plan.depends("sparse" if settings.visibility == "sparse" else "dag").tolist()
        starts = plan.starts(trunk.start + current.begin)
        ends = list(accumulate((span.entry for span in plan.spans), initial=current.begin))[1:]
        before = canvas.new_upto(trunk) - len(trunk.tokens)
        for number in range(len(lanes), len(plan.spans)):
            span = plan.spans[number]
            lane = Lane("span", trunk.span + 1 + 2 * number, starts[number], [control.async_, *span.label])
            lane.opening, lane.hidden, lane.part, lane.planned = span.opening, [(0, 1)], number, span.length
            most = span.opening + math.ceil(span.length * settings.max_span_extension)
            # Not what is left when it starts: that depends on how fast its siblings are.
            lane.limit = min(most, canvas.budget - before - ends[number])
            lane.window, lane.verified = self.window, settings.verify_spans
            lane.depends = tuple(lanes[k] for k, reads in enumerate(related[number][:number]) if reads)
            read = (other.span for other in lane.depends)
            self.runner.relate(line, lane.span, [*trunk.sees, trunk.span, *trunk.segments[:number], *read])
            if span.text is not None:
                lane.tokens += span.text
                lane.finish("given")
            lanes.append(lane)
            canvas.lanes.append(lane)
        canvas.num_spans = trunk.span + 2 * len(lanes)

    def _dense_lane(self, canvas: Canvas, trunk: Lane, plan: Plan, before: list[int], line: int) -> Lane:
        """The whole round as one block; openings are given, everything else is open."""
        lane = Lane("canvas", canvas.new_span(), trunk.end, [], verified=False)
        for span in plan.spans:
            lane.fills += [*self.grammar.opening(span), *[None] * span.length]
        lane.window = lane.limit = len(lane.fills)
        self.runner.relate(line, lane.span, before)
        canvas.lanes.append(lane)
        return lane

    def close(self, lane: Lane, fills: list[int | None]) -> list[int | None]:
        """In a dense round ``<spad>`` closes the rest of its part alone."""
        if lane.kind != "canvas":
            return super().close(lane, fills)
        closed: list[int | None] = []
        ended = False
        for token in fills:
            ended = token == self.control.spad or (ended and token != self.control.async_)
            closed.append(self.control.spad if ended else token)
        return closed

    def _split_canvas(self, canvas: Canvas, lane: Lane) -> None:
        """A filled dense round becomes one finished lane per part; they go into the cache as clean rows of one span."""
        current = self.rounds[canvas.row][-1]
        plan, lanes = current.plan, current.lanes
        at = canvas.lanes.index(lane)
        lanes.clear()
        for number, (span, start) in enumerate(zip(plan.spans, plan.dense_starts(lane.start), strict=True)):
            begin = start - lane.start
            body = lane.tokens[begin + span.opening : begin + span.opening + span.length]
            body = body[: body.index(self.control.spad)] if self.control.spad in body else body
            part = Lane("span", lane.span, start, [*self.grammar.opening(span), *body], hidden=[(0, 1)], part=number)
            part.opening, part.planned, part.passes = span.opening, span.length, lane.passes
            part.finish("end" if len(body) < span.length else "limit")
            lanes.append(part)
        canvas.lanes[at : at + 1] = lanes

    def _span_finished(self, canvas: Canvas, line: int) -> None:
        """When the whole round stands, open the next trunk segment with ``<sync/>``."""
        current = self.rounds[canvas.row][-1]
        if not current.whole or not all(lane.done for lane in current.lanes):
            return
        ahead = canvas.lanes[-1]
        if ahead.kind == "trunk" and ahead.trial:
            if ahead.came_true():
                return
            self._withdraw(canvas, ahead)
        if canvas.num_new >= canvas.budget:
            canvas.finished = True
            return
        self._open_sync(canvas, line, [])

    def _open_sync(self, canvas: Canvas, line: int, trial: list[tuple[Lane, list[int]]]) -> None:
        """The next trunk segment, behind parts that stand or, on ``trial``, are expected to stand."""
        end = max([canvas.end, *(lane.start + len(tokens) for lane, tokens in trial)])
        before = tuple(range(canvas.num_spans))
        sync = Lane("trunk", canvas.new_span(), end, [self.control.sync], hidden=[(0, 1)], sees=before, trial=trial)
        sync.limit = canvas.budget - canvas.num_new - sum(len(tokens) - len(lane.tokens) for lane, tokens in trial)
        self.runner.relate(line, sync.span, before)
        canvas.lanes.append(sync)
        self._open_segment(canvas, sync, line)

    def look_ahead(self, canvas: Canvas, line: int) -> None:
        """A part whose last dependency is expected to end, and ``<sync/>`` where the last part is, ride in the pass
        that checks the end. Entries of the plan that are on trial get their spans."""
        for lane in canvas.running():
            self._reserve(lane, line)
        rounds = self.rounds[canvas.row]
        if not rounds:
            return
        current = rounds[-1]
        for lane in current.lanes:
            if not (lane.done or lane.ready()):
                lane.trial = canvas.expected(lane.depends)
        if canvas.lanes[-1].kind == "trunk" or not current.whole or len(rounds) < len(self.given):
            return
        trial = canvas.expected(current.lanes)
        if trial and canvas.num_new + sum(len(tokens) - len(lane.tokens) for lane, tokens in trial) < canvas.budget:
            self._open_sync(canvas, line, trial)

    def dismiss(self, canvas: Canvas, lane: Lane) -> None:
        """A ``<sync/>`` too early is taken back."""
        super().dismiss(canvas, lane)
        if lane.kind == "trunk" and lane in canvas.lanes:
            self._withdraw(canvas, lane)

    def _withdraw(self, canvas: Canvas, sync: Lane) -> None:
        canvas.lanes.remove(sync)
        canvas.num_spans = sync.span
        del self.states[sync]

    def finished(self, canvas: Canvas) -> None:
        """Report every part as it stands in the answer."""
        report = self.reports[canvas.row]
        for number, current in enumerate(self.rounds[canvas.row], 1):
            plan, lanes = current.plan, current.lanes
            if not current.whole:  # a stopping criterion met the text of a part before the plan was complete
                report.plans.append(plan)
            if len(lanes) < len(plan.spans):  # a dense round that was never filled
                continue
            for part, (span, lane) in enumerate(zip(plan.spans, lanes, strict=True)):
                text = lane.tokens[lane.opening :]
                extended = len(text) > span.length and lane.reason != "given"
                report.spans.append(
                    SpanReport(
                        number, part, span.label, span.depends, span.length, text, lane.passes, extended, lane.reason
                    )
                )
                name = f"part {part + 1} of round {number}"
                if extended:
                    report.fallbacks.append(f"{name} was extended from {span.length} to {len(text)} tokens")
                if lane.reason == "limit":
                    report.fallbacks.append(f"{name} was cut at {len(text)} tokens")

    def forget(self, canvas: Canvas) -> None:
        """Its grammar states and rounds too."""
        super().forget(canvas)
        del self.rounds[canvas.row]
        for lane in canvas.lanes:
            self.states.pop(lane, None)

    def stage(self, canvas: Canvas) -> str:
        """``plan`` while the trunk plans (parts may be written beside it), ``spans`` while parts alone run, else
        ``text``."""
        trunk = next(lane for lane in reversed(canvas.lanes) if lane.kind == "trunk" and not lane.trial)
        if trunk.done:
            return "spans"
        return "text" if self.states[trunk].stage == "text" and self.rounds[canvas.row] else "plan"

    # Bounds.

    def _rounds_left(self, canvas: Canvas) -> bool:
        switched = bool(canvas.lanes[0].hidden)  # True: <par> was put behind the prompt
        return switched and not self.given and len(self.rounds[canvas.row]) < self.settings.max_rounds

    def _room(self, canvas: Canvas, drafted: int) -> int:
        """Tokens left for the rest of the plan and its parts: what parts hold already is in their planned lengths."""
        trunk = next(lane for lane in reversed(canvas.lanes) if lane.kind == "trunk")
        ahead = sum(len(tokens) - len(lane.tokens) for lane, tokens in trunk.trial)
        return canvas.budget - canvas.new_upto(trunk) - ahead - drafted

    def _note_room(self, canvas: Canvas, state: PlanState) -> None:
        """Tell that a plan ended where it had to: the answer may look whole."""
        free, bounded = (self.grammar.choices(state, True, room)[1] for room in (None, self._room(canvas, 0)))
        if self.control.topic in free and self.control.topic not in bounded:
            note = f"the plan ended with part {len(state.parts)}: {canvas.budget} tokens leave no room for another"
            self.reports[canvas.row].fallbacks.append(note)

    def _fresh(self, canvas: Canvas, lane: Lane) -> bool:
        """True: nothing was written behind the switch or ``<sync/>`` that opened the segment."""
        return lane.tokens[-1] in (self.control.par, self.control.sync) and self.states[lane].stage == "text"

    def _check_plans(self, plans: Plan | Sequence[Plan] | None) -> tuple[Plan, ...]:
        if plans is None:
            return ()
        given = (plans,) if isinstance(plans, Plan) else tuple(plans)
        if not given or not all(isinstance(plan, Plan) for plan in given):
            raise DecodingError("plan= takes a hf_hybrid.Plan, or one per round")
        if len(given) > self.settings.max_rounds:
            raise DecodingError(f"{len(given)} plans are more than max_rounds={self.settings.max_rounds}")
        known = {length for length, _ in self.control.lengths}
        for plan in given:
            plan.check(self.settings.limits, self.control)
            if self.settings.visibility == "dense" and any(span.text is not None for span in plan.spans):
                raise DecodingError("visibility='dense' writes a whole round at once; leave the given texts out")
            odd = [span.length for span in plan.spans if span.length > max(known)]
            if odd:
                raise DecodingError(f"a part of {odd[0]} tokens is longer than the longest length token ({max(known)})")
        return given
