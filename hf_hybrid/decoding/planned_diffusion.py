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

from itertools import accumulate

from torch import Tensor

from hf_hybrid.config import PlannedDiffusionSettings
from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.core.plan import ControlTokens, Plan, PlanGrammar, PlanState
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.output import DecodingError
from hf_hybrid.decoding.parts import Parts, Round, check_plans, check_room, report_parts
from hf_hybrid.decoding.strategy import Strategy


class PlannedDiffusion(Strategy):
    """Rounds of a plan and its spans on one trunk."""

    def __init__(self, context: Context):
        super().__init__(context)
        settings, control = context.call.settings, context.call.control
        assert isinstance(settings, PlannedDiffusionSettings)
        if not isinstance(control, ControlTokens):
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
        self.parts = Parts(settings, control, self.grammar, context.runner)
        self.given = check_plans(context.call.plan, settings, control, context.vocab_size, context.ends)
        self.states: dict[Lane, PlanState] = {}
        self.rounds: dict[int, list[Round]] = {}
        self.in_span = tuple({*control.banned, *context.ends} - {control.spad})
        self.lengths = frozenset(token for _, token in control.lengths)
        self.in_canvas = (control.mask, control.par, control.sync)

    # The trunk.

    def begin(self, canvas: Canvas, line: int) -> None:
        """The prompt and the switch, and an optimistic first ``<topic>``."""
        self.rounds[canvas.row] = []
        first = len(canvas.prompt)
        trunk = Lane("trunk", canvas.new_span(), 0, list(canvas.prompt), positions=canvas.positions)
        canvas.lanes.append(trunk)
        check_room(self.given, canvas, self.settings.visibility == "dense")
        if fault := self._no_plan(canvas):
            trunk.limit = first + canvas.budget
            self.reports[canvas.row].fallbacks.append(f"no plan: {fault}")
            self.states[trunk] = PlanState()
            return
        trunk.tokens.append(self.control.par)
        trunk.hidden.append((first, first + 1))
        self._open_segment(canvas, trunk, line)

    def _no_plan(self, canvas: Canvas) -> str:
        """Why the answer is written plainly; empty: it begins with a plan."""
        if canvas.plain:
            if self.given:
                raise DecodingError(
                    "plan= and continue_final_message=True exclude each other: behind the beginning of an answer there "
                    "is no place for a plan; leave one of them out"
                )
            return "the prompt ends inside of an answer (continue_final_message)"
        left = canvas.positions - len(canvas.prompt)
        # <par>, an entry and an opening with the longest label, and some text: decided before anything is written.
        needed = 4 + 2 * self.settings.max_label_length + self.control.lengths[0][0]
        short = left < needed and not self.given
        return f"the model has {left} positions left, and a part may need {needed}" if short else ""

    def _open_segment(self, canvas: Canvas, trunk: Lane, line: int) -> None:
        """A new trunk segment: with a given plan its tokens are forced, else the model writes."""
        self.states[trunk] = PlanState()
        number = len(self.rounds[canvas.row])
        if number < len(self.given):
            plan = self.given[number]
            forced = [*plan.lead, *plan.render(self.control)]
            if len(trunk.tokens) + len(forced) > trunk.most:  # the parts before it took the positions
                trunk.tokens += plan.lead[: trunk.most - len(trunk.tokens)]
                trunk.finish("length")
                canvas.end_by_length()
                return
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
            masks.append(self.grammar.allowed(state, self._rounds_left(canvas)))
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
            text, control = self.grammar.choices(state, self._rounds_left(canvas))
            special = token in self.control.banned or token in self.context.ends
            if not (token in control if special else text):
                break
            state = self._follow(lane, state, token, len(lane.tokens) + len(legal))
            legal.append(token)
        lane.ending = lane.ending and len(legal) == len(drafted)
        fresh = self._fresh(canvas, lane) and not lane.window
        if not (legal or lane.ending) and (self.states[lane].stage == "length" or fresh):
            _, control = self.grammar.choices(self.states[lane], self._rounds_left(canvas))
            if self.control.topic in control and len(lane.tokens) < lane.most:
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
                self.parts.split(canvas, self.rounds[canvas.row][-1], lane)
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
            text, control = self.grammar.choices(state, self._rounds_left(canvas))
            if text or len(control) != 1:
                break
            lane.settle(control, self.terminators(lane))
            state = state if lane.done else self._follow(lane, state, control[0], len(lane.tokens) - 1)
        self.states[lane] = state
        whole = lane.done and lane.reason == "end" and state.stage == "length"
        complete = state.parts if whole else state.parts[: state.complete]
        if lane.done and not whole and (state.stage == "text" or not complete or canvas.control):
            canvas.finished = True
            if lane.reason != "end":
                canvas.end_by_length()
        elif state.stage != "text":
            begin = lane.hidden[-1][0]
            # Behind the prompt and <par>, or behind <sync/>, up to the plan.
            lead = tuple(lane.tokens[lane.hidden[0][1] : begin])
            # Where positions end inside of a plan, the parts that it names so far are written, and nothing behind them.
            self._carry_out(canvas, lane, begin, Plan(complete, lead), line, lane.done)

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
        """Lanes for the parts of ``plan``, which stands at ``trunk.tokens[begin:]``; ``whole``: no part will follow."""
        rounds, dense = self.rounds[canvas.row], self.settings.visibility == "dense"
        if not plan.spans or (dense and not whole):
            return
        if not rounds or rounds[-1].trunk is not trunk:
            rounds.append(Round(trunk, begin, plan))
        current = rounds[-1]
        current.plan, current.whole = plan, whole
        if dense:
            if trunk.end >= canvas.positions:
                canvas.end_by_length()
                return
            self.parts.start_dense(canvas, current, line)
        else:
            self._reserve(trunk, line)
            self.parts.start(canvas, current, line)
        if whole:
            self._span_finished(canvas, line)

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
        end = canvas.end
        if canvas.room <= 0 or current.trunk.reason == "length" or end + 1 >= canvas.positions:
            canvas.end_by_length()
            return
        self._open_sync(canvas, line, end, [])

    def _open_sync(self, canvas: Canvas, line: int, end: int, trial: list[tuple[Lane, list[int]]]) -> None:
        """The next trunk segment, at position ``end`` behind parts that stand or, on ``trial``, are expected to
        stand."""
        before = tuple(range(canvas.num_spans))
        sync = Lane("trunk", canvas.new_span(), end, [self.control.sync], hidden=[(0, 1)], sees=before, trial=trial)
        sync.positions = canvas.positions
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
        if current.trunk.reason == "length":
            return
        trial = canvas.expected(current.lanes)
        end = max([canvas.end, *(lane.start + len(tokens) for lane, tokens in trial)])
        more = sum(len(tokens) - len(lane.tokens) for lane, tokens in trial)
        if trial and more < canvas.room and end + 1 < canvas.positions:
            self._open_sync(canvas, line, end, trial)

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
        """Report every plan, and every part as it stands in the answer."""
        for number, current in enumerate(self.rounds[canvas.row], 1):
            report_parts(self.reports[canvas.row], number, current)

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

    def _fresh(self, canvas: Canvas, lane: Lane) -> bool:
        """True: nothing was written behind the switch or ``<sync/>`` that opened the segment."""
        return lane.tokens[-1] in (self.control.par, self.control.sync) and self.states[lane].stage == "text"
