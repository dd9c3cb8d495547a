"""Planned diffusion: an autoregressive plan names the parts and their lengths, then all parts are written at once.

Source: Israel et al., "Planned Diffusion", 2025, section 3; lanes that finish at their own time as in Jin et al.,
"Learning to Keep a Promise" (PASTA), 2025. Ours: lengths are tokens of their own, parts may depend on earlier parts,
text may stand before, between and behind rounds, a part may outgrow its plan, and by default every drafted token is
checked by the clean rows of the next pass, so that the text equals ``span_decoding="autoregressive"``.

The trunk is a chain of lanes, one per segment: the prompt with the switch of the grammar, and what follows each round,
from the tokens that resume the trunk. Between two segments stand the lanes of a round. A part reads the trunk as far as
its own entry of the plan, so it begins when that entry stands, beside the rest of the plan: every further entry is a
span of its own (in one lane), which the parts before it do not read.
"""

from __future__ import annotations

from itertools import accumulate, chain

from torch import Tensor

from hf_hybrid.config import PlannedDiffusionSettings
from hf_hybrid.core.canvas import Canvas, Lane
from hf_hybrid.core.grammars import PlanState, grammar_of
from hf_hybrid.core.plan import Plan
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
        if control is None or control.tags is None:
            raise DecodingError(
                "planned_diffusion needs control tokens, and the model has none; add them with "
                "hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"
            )
        diffusing = settings.span_decoding == "diffusion"
        if settings.commit == "block" and settings.verify_spans and diffusing and settings.visibility != "dense":
            raise DecodingError("commit='block' keeps a block noisy, so nothing can be checked; add verify_spans=False")
        self.settings = settings
        self.grammar = grammar_of(control, context.vocab_size, settings.limits)
        self.parts = Parts(settings, self.grammar, context.runner)
        self.given = check_plans(context.call.plan, settings, self.grammar, context.ends)
        self.states: dict[Lane, PlanState] = {}
        self.rounds: dict[int, list[Round]] = {}
        self.resumed = len(self.grammar.resume)
        self.in_part = tuple({*self.grammar.never_in_part, *context.ends} - {self.grammar.part_end})

    # The trunk.

    def begin(self, canvas: Canvas, line: int) -> None:
        """The prompt and the switch, and optimistically the first token of a plan."""
        self.rounds[canvas.row] = []
        first = len(canvas.prompt)
        trunk = Lane("trunk", canvas.new_span(), 0, list(canvas.prompt), positions=canvas.positions)
        canvas.lanes.append(trunk)
        check_room(self.given, self.grammar, canvas, self.settings.visibility == "dense")
        if fault := self._no_plan(canvas):
            trunk.limit = first + canvas.budget
            self.reports[canvas.row].fallbacks.append(f"no plan: {fault}")
            self.states[trunk] = PlanState()
            return
        trunk.tokens += self.grammar.switch
        trunk.hidden.append((first, len(trunk.tokens)))
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
        needed = self.grammar.least_round  # decided before anything is written
        short = left < needed and not self.given
        return f"the model has {left} positions left, and a part may need {needed}" if short else ""

    def _open_segment(self, canvas: Canvas, trunk: Lane, line: int) -> None:
        """A new trunk segment: with a given plan its tokens are forced, else the model writes."""
        self.states[trunk] = PlanState()
        number = len(self.rounds[canvas.row])
        if number < len(self.given):
            plan = self.given[number]
            entries = self.grammar.entries(plan)
            forced = [*plan.lead, *chain(*entries)]
            if len(trunk.tokens) + len(forced) > trunk.most:  # the parts before it took the positions
                trunk.tokens += plan.lead[: trunk.most - len(trunk.tokens)]
                trunk.finish("length")
                canvas.end_by_length()
                return
            begin = len(trunk.tokens) + len(plan.lead)
            trunk.hidden.append((begin, len(trunk.tokens) + len(forced)))
            trunk.tokens += forced
            if self.settings.visibility != "dense":
                trunk.breaks = [begin + size for size in accumulate(map(len, entries[:-1]))]
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
        """Parts hold text and what ends them; windows over the trunk may propose a plan."""
        if lane.kind == "trunk":
            return self.grammar.never_in_window if lane.window else ()
        return self.in_part

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """What ends a part, a plan, and the answer."""
        if lane.kind == "trunk":
            return {**super().terminators(lane), self.grammar.plan_end: False}
        # In a dense round the end of a part ends nothing else; the lane ends when it is full.
        return {} if lane.kind == "canvas" else {self.grammar.part_end: False}

    def draft(self, canvas: Canvas, lane: Lane, proposed: list[int]) -> list[int]:
        """Proposals as far as the grammar allows them; without any, optimistically what opens an entry where one may
        follow."""
        drafted = super().draft(canvas, lane, proposed)
        if lane.kind != "trunk":
            return drafted
        state, legal = self.states[lane], []
        self._forget_breaks(lane, len(lane.tokens))
        for token in drafted:
            text, control = self.grammar.choices(state, self._rounds_left(canvas))
            special = token in self.grammar.banned or token in self.context.ends
            if not (token in control if special else text):
                break
            state = self._follow(lane, state, token, len(lane.tokens) + len(legal))
            legal.append(token)
        lane.ending = lane.ending and len(legal) == len(drafted)
        fresh = self._fresh(canvas, lane) and not lane.window
        if not (legal or lane.ending) and (self.states[lane].stage == "length" or fresh):
            _, control = self.grammar.choices(self.states[lane], self._rounds_left(canvas))
            opening = next(filter(self.grammar.opens, control), None)
            if opening is not None and len(lane.tokens) < lane.most:
                legal = [opening]
                self._follow(lane, self.states[lane], opening, len(lane.tokens))
        return legal

    def guesses(self, lane: Lane) -> frozenset[int]:
        """A planned length is a guess, which seldom changes the labels behind it."""
        return self.grammar.guesses if lane.kind == "trunk" else frozenset()

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
            if state.stage == "text" and self.grammar.opens(token):
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
        complete = state.parts if whole else state.parts[: self.grammar.complete(state)]
        if lane.done and not whole and (state.stage == "text" or not complete or canvas.control):
            canvas.finished = True
            if lane.reason != "end":
                canvas.end_by_length()
        elif state.stage != "text":
            begin = lane.hidden[-1][0]
            # Behind the tokens that opened the segment, up to the plan.
            lead = tuple(lane.tokens[lane.hidden[0][1] : begin])
            # Where positions end inside of a plan, the parts that it names so far are written, and nothing behind them.
            self._carry_out(canvas, lane, begin, Plan(complete, lead), line, lane.done)

    def _follow(self, trunk: Lane, state: PlanState, token: int, index: int) -> PlanState:
        """The state behind ``token``, which stands (or is on trial) at ``index``; notes where an entry begins."""
        if state.stage == "length" and self.grammar.opens(token) and self.settings.visibility != "dense":
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
        """In a dense round the end of a part closes the rest of that part alone."""
        return self.grammar.closed(fills) if lane.kind == "canvas" else super().close(lane, fills)

    def _span_finished(self, canvas: Canvas, line: int) -> None:
        """When the whole round stands, open the next trunk segment."""
        current = self.rounds[canvas.row][-1]
        if not current.whole or not all(lane.done for lane in current.lanes):
            return
        ahead = canvas.lanes[-1]
        if ahead.kind == "trunk" and ahead.trial:
            if ahead.came_true():
                return
            self._withdraw(canvas, ahead)
        end = canvas.end
        if canvas.room <= 0 or current.trunk.reason == "length" or end + self.resumed >= canvas.positions:
            canvas.end_by_length()
            return
        self._resume(canvas, line, end, [])

    def _resume(self, canvas: Canvas, line: int, end: int, trial: list[tuple[Lane, list[int]]]) -> None:
        """The next trunk segment, at position ``end`` behind parts that stand or, on ``trial``, are expected to
        stand."""
        before = tuple(range(canvas.num_spans))
        trunk = Lane("trunk", canvas.new_span(), end, list(self.grammar.resume), sees=before, trial=trial)
        trunk.hidden, trunk.positions = [(0, self.resumed)], canvas.positions
        self.runner.relate(line, trunk.span, before)
        canvas.lanes.append(trunk)
        self._open_segment(canvas, trunk, line)

    def look_ahead(self, canvas: Canvas, line: int) -> None:
        """A part whose last dependency is expected to end, and the next segment where the last part is, ride in the
        pass that checks the end. Entries of the plan that are on trial get their spans."""
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
        if trial and more < canvas.room and end + self.resumed < canvas.positions:
            self._resume(canvas, line, end, trial)

    def dismiss(self, canvas: Canvas, lane: Lane) -> None:
        """A segment that was opened too early is taken back."""
        super().dismiss(canvas, lane)
        if lane.kind == "trunk" and lane in canvas.lanes:
            self._withdraw(canvas, lane)

    def _withdraw(self, canvas: Canvas, trunk: Lane) -> None:
        canvas.lanes.remove(trunk)
        canvas.num_spans = trunk.span
        del self.states[trunk]

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
        switched = bool(canvas.lanes[0].hidden)  # True: the switch was put behind the prompt
        return switched and not self.given and len(self.rounds[canvas.row]) < self.settings.max_rounds

    def _fresh(self, canvas: Canvas, lane: Lane) -> bool:
        """True: nothing was written behind the tokens that opened the segment."""
        return bool(lane.hidden) and len(lane.tokens) == lane.hidden[0][1] and self.states[lane].stage == "text"
