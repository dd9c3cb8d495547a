"""Planned diffusion: an autoregressive plan names the parts and their lengths, then all parts are written at once.

Source: Israel et al., "Planned Diffusion", 2025, section 3; lanes that finish at their own time as in Jin et al.,
"Learning to Keep a Promise" (PASTA), 2025. Ours: lengths are tokens of their own, parts may depend on earlier parts,
there may be text before, between and behind rounds, a part may outgrow its plan, and by default every drafted token is
checked by the clean rows of the next pass, so that the text equals ``span_decoding="autoregressive"``.

The trunk is a chain of lanes, one per segment: the prompt with the switch of the grammar, and what follows each round,
from the tokens that resume the trunk. Between two segments are the lanes of a round. A part reads the trunk as far as
its own entry of the plan, so it begins when that entry is settled, beside the rest of the plan: every further entry is
a span of its own (in one lane), which the parts before it do not read.
"""

from __future__ import annotations

from itertools import accumulate, chain

from torch import Tensor

from hf_hybrid.config import PlannedDiffusionSettings, Settings
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.grammars import PlanState, grammar_of
from hf_hybrid.core.lane import AcceptRule, Bounds, Lane
from hf_hybrid.core.plan import Plan
from hf_hybrid.decoding.call import Context
from hf_hybrid.decoding.output import DecodingError, GenerationReport
from hf_hybrid.decoding.rounds import Parts, Round, check_plans, check_room, report_parts
from hf_hybrid.decoding.writer import Shared, Writer


class Planning(Shared):
    """What the answers of a call share: the grammar, given plans, and how lanes settle."""

    def __init__(self, context: Context, settings: Settings):
        control = context.call.control
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
        self.dense = settings.visibility == "dense"
        self.grammar = grammar_of(control, context.vocab_size, settings.limits)
        self.given = check_plans(context.call.plan, settings, self.grammar, context.ends)
        self.in_part = tuple({*self.grammar.never_in_part, *context.ends} - {self.grammar.part_end})
        self.on_trunk = AcceptRule(draft_threshold=settings.draft_threshold)


class PlannedDiffusion(Writer):
    """Rounds of a plan and its parts on one trunk."""

    shared: Planning

    def __init__(self, context: Context, shared: Planning, canvas: Canvas, report: GenerationReport):
        super().__init__(context, shared, canvas, report)
        self.settings, self.grammar, self.given = shared.settings, shared.grammar, shared.given
        self.parts = Parts(shared.settings, shared.grammar, context.runner)
        self.states: dict[Lane, PlanState] = {}
        self.rounds: list[Round] = []
        self.resumed = len(self.grammar.resume)

    @classmethod
    def share(cls, context: Context, settings: Settings) -> Planning:
        """See ``Writer.share``."""
        return Planning(context, settings)

    # The trunk.

    def take_over(self, trunk: Lane) -> None:
        """The switch, and optimistically the first token of a plan."""
        canvas, first = self.canvas, len(trunk.tokens)
        trunk.rule = self.shared.on_trunk
        check_room(self.given, self.grammar, canvas, self.shared.dense)
        if fault := self._no_plan():
            self.report.fallbacks.append(f"no plan: {fault}")
            self.states[trunk] = PlanState()
            return
        trunk.bounds = Bounds(positions=canvas.positions)
        trunk.tokens += self.grammar.switch
        trunk.hidden.append((first, len(trunk.tokens)))
        self._open_segment(trunk)

    def _no_plan(self) -> str:
        """Why the answer is written plainly; empty: it begins with a plan."""
        canvas = self.canvas
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

    def _open_segment(self, trunk: Lane) -> None:
        """A new trunk segment: with a given plan its tokens are forced, else the model writes."""
        self.states[trunk] = PlanState()
        number = len(self.rounds)
        if number < len(self.given):
            plan = self.given[number]
            entries = self.grammar.entries(plan)
            forced = [*plan.lead, *chain(*entries)]
            if len(trunk.tokens) + len(forced) > trunk.most:  # the parts before it took the positions
                trunk.tokens += plan.lead[: trunk.most - len(trunk.tokens)]
                trunk.finish("length")
                self.canvas.end_by_length()
                return
            begin = len(trunk.tokens) + len(plan.lead)
            trunk.hidden.append((begin, len(trunk.tokens) + len(forced)))
            trunk.tokens += forced
            if not self.shared.dense:
                trunk.entries.begins = [begin + size for size in accumulate(map(len, entries[:-1]))]
            trunk.finish("end")
            self._carry_out(trunk, begin, plan, whole=True)
            return
        trunk.window.length = self.settings.plan_window
        trunk.drafted.tokens = self.draft(trunk, [])

    def allowed(self, lane: Lane) -> list[Tensor | None]:
        """The plan grammar behind every trunk token, settled or drafted; parts are free but for ``forbidden``."""
        if lane.kind != "trunk":
            return super().allowed(lane)
        state, masks = self.states[lane], []
        for token in (*lane.drafted.tokens, None):
            masks.append(self.grammar.allowed(state, self._rounds_left()))
            if token is not None:
                state = self.grammar.advance(state, token)
        return masks

    def forbidden(self, lane: Lane) -> tuple[int, ...]:
        """Parts hold text and what ends them; windows over the trunk may propose a plan."""
        if lane.kind == "trunk":
            return self.grammar.never_in_window if lane.window.length else ()
        return self.shared.in_part

    def terminators(self, lane: Lane) -> dict[int, bool]:
        """What ends a part, a plan, and the answer."""
        if lane.kind == "trunk":
            return {**super().terminators(lane), self.grammar.plan_end: False}
        # In a dense round the end of a part ends nothing else; the lane ends when it is full.
        return {} if lane.kind == "canvas" else {self.grammar.part_end: False}

    def draft(self, lane: Lane, proposed: list[int]) -> list[int]:
        """Proposals as far as the grammar allows them; without any, optimistically what opens an entry where one may
        follow."""
        drafted = super().draft(lane, proposed)
        if lane.kind != "trunk":
            return drafted
        state, legal = self.states[lane], []
        self._forget_entries(lane, len(lane.tokens))
        for token in drafted:
            text, control = self.grammar.choices(state, self._rounds_left())
            special = token in self.grammar.banned or token in self.context.ends
            if not (token in control if special else text):
                break
            state = self._follow(lane, state, token, len(lane.tokens) + len(legal))
            legal.append(token)
        lane.drafted.ending = lane.drafted.ending and len(legal) == len(drafted)
        fresh = self._fresh(lane) and not lane.window.length
        if not (legal or lane.drafted.ending) and (self.states[lane].stage == "length" or fresh):
            _, control = self.grammar.choices(self.states[lane], self._rounds_left())
            opening = next(filter(self.grammar.opens, control), None)
            if opening is not None and len(lane.tokens) < lane.most:
                legal = [opening]
                self._follow(lane, self.states[lane], opening, len(lane.tokens))
        return legal

    def guesses(self, lane: Lane) -> frozenset[int]:
        """A planned length is a guess, which seldom changes the labels behind it."""
        return self.grammar.guesses if lane.kind == "trunk" else frozenset()

    def settled(self, lane: Lane, tokens: list[int]) -> None:
        """Follow the grammar on the trunk, report finished spans, and start what comes next."""
        if lane.kind == "trunk":
            self._trunk_settled(lane, tokens)
        elif lane.done:
            if lane.kind == "canvas":
                self.parts.split(self.canvas, self.rounds[-1], lane)
            self._part_finished()

    def _trunk_settled(self, lane: Lane, tokens: list[int]) -> None:
        canvas = self.canvas
        state, first = self.states[lane], len(lane.tokens) - len(tokens)
        self._forget_entries(lane, first)
        for number, token in enumerate(tokens, first):
            if state.stage == "text" and self.grammar.opens(token):
                lane.hidden.append((number, 1 << 40))
            if token not in self.context.ends:
                state = self._follow(lane, state, token, number)
        while not lane.done:  # where the grammar leaves one choice, no pass is spent
            text, control = self.grammar.choices(state, self._rounds_left())
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
            self._carry_out(lane, begin, Plan(complete, lead), lane.done)

    def _follow(self, trunk: Lane, state: PlanState, token: int, index: int) -> PlanState:
        """The state behind ``token``, settled or drafted at ``index``; notes where an entry begins."""
        if state.stage == "length" and self.grammar.opens(token) and not self.shared.dense:
            trunk.entries.begins.append(index)
        return self.grammar.advance(state, token)

    def _forget_entries(self, trunk: Lane, index: int) -> None:
        """Entries that begin at ``index`` or later were drafted."""
        trunk.entries.begins = [at for at in trunk.entries.begins if at < index]

    def _reserve(self, trunk: Lane) -> None:
        """A span for every entry that begins in its tokens or in its draft. Parts take the ids between them
        (`hf_hybrid.training.layout`)."""
        entries = trunk.entries
        while len(entries.spans) < len(entries.begins):
            span = trunk.span + 2 * (len(entries.spans) + 1)
            self.context.runner.relate(self.canvas.line, span, [*entries.sees, trunk.span, *entries.spans])
            entries.spans.append(span)

    # Rounds.

    def _carry_out(self, trunk: Lane, begin: int, plan: Plan, whole: bool) -> None:
        """Lanes for the parts of ``plan``, which begins at ``trunk.tokens[begin]``; ``whole``: no part will follow."""
        dense = self.shared.dense
        if not plan.spans or (dense and not whole):
            return
        if not self.rounds or self.rounds[-1].trunk is not trunk:
            self.rounds.append(Round(trunk, begin, plan))
        current = self.rounds[-1]
        current.plan, current.whole = plan, whole
        if dense:
            if trunk.end >= self.canvas.positions:
                self.canvas.end_by_length()
                return
            self.parts.start_dense(self.canvas, current)
        else:
            self._reserve(trunk)
            self.parts.start(self.canvas, current)
        if whole:
            self._part_finished()

    def close(self, lane: Lane, fills: list[int | None]) -> list[int | None]:
        """In a dense round the end of a part closes the rest of that part alone."""
        return self.grammar.closed(fills) if lane.kind == "canvas" else super().close(lane, fills)

    def _part_finished(self) -> None:
        """When the whole round is finished, open the next trunk segment."""
        canvas, current = self.canvas, self.rounds[-1]
        if not current.whole or not all(lane.done for lane in current.lanes):
            return
        ahead = canvas.lanes[-1]
        if ahead.kind == "trunk" and ahead.assumed:
            if ahead.assumed_rightly():
                return
            self._withdraw(ahead)
        end = canvas.end
        if canvas.room <= 0 or current.trunk.reason == "length" or end + self.resumed >= canvas.positions:
            canvas.end_by_length()
            return
        self._resume(end, [])

    def _resume(self, end: int, assumed: list[tuple[Lane, list[int]]]) -> None:
        """The next trunk segment, at position ``end`` behind parts that are finished, or ``assumed`` to be."""
        canvas = self.canvas
        before = tuple(range(canvas.num_spans))
        trunk = Lane("trunk", canvas.new_span(), end, list(self.grammar.resume), rule=self.shared.on_trunk)
        trunk.entries.sees, trunk.assumed, trunk.hidden = before, assumed, [(0, self.resumed)]
        trunk.bounds = Bounds(positions=canvas.positions)
        self.context.runner.relate(canvas.line, trunk.span, before)
        canvas.lanes.append(trunk)
        self._open_segment(trunk)

    def look_ahead(self) -> None:
        """A part whose last dependency is expected to end, and the next segment where the last part is, ride in the
        pass that checks the end. Entries of the plan that are drafted get their spans."""
        canvas = self.canvas
        for lane in canvas.running():
            self._reserve(lane)
        if not self.rounds:
            return
        current = self.rounds[-1]
        for lane in current.lanes:
            if lane.part is not None and not (lane.done or lane.ready()):
                lane.assumed = canvas.expected(lane.part.depends)
        if canvas.lanes[-1].kind == "trunk" or not current.whole or len(self.rounds) < len(self.given):
            return
        if current.trunk.reason == "length":
            return
        assumed = canvas.expected(current.lanes)
        end = max([canvas.end, *(lane.start + len(tokens) for lane, tokens in assumed)])
        more = sum(len(tokens) - len(lane.tokens) for lane, tokens in assumed)
        if assumed and more < canvas.room and end + self.resumed < canvas.positions:
            self._resume(end, assumed)

    def dismiss(self, lane: Lane) -> None:
        """A segment that was opened too early is taken back."""
        super().dismiss(lane)
        if lane.kind == "trunk" and lane in self.canvas.lanes:
            self._withdraw(lane)

    def _withdraw(self, trunk: Lane) -> None:
        self.canvas.lanes.remove(trunk)
        self.canvas.num_spans = trunk.span
        del self.states[trunk]

    def finished(self) -> None:
        """Report every plan, and every part as it is in the answer."""
        for number, current in enumerate(self.rounds, 1):
            report_parts(self.report, number, current)

    def stage(self) -> str:
        """``plan`` while the trunk plans (parts may be written beside it), ``spans`` while parts alone run, else
        ``text``."""
        trunk = next(lane for lane in reversed(self.canvas.lanes) if lane.kind == "trunk" and not lane.assumed)
        if trunk.done:
            return "spans"
        return "text" if self.states[trunk].stage == "text" and self.rounds else "plan"

    def prefix_of(self, lane: Lane) -> list[int]:
        """The prompt, earlier rounds, the plan as far as the entry of a part, the parts that it depends on, and its own
        tokens."""
        canvas = self.canvas
        before = canvas.lanes[: canvas.lanes.index(lane)]
        trunks = [other for other in before if other.kind == "trunk"]
        seen = list(canvas.prompt if canvas.given is None else canvas.given)
        skip = len(canvas.prompt)  # it is in the first lane
        for other in before:
            if lane.part is None or other in lane.part.depends or other.span in trunks[-1].entries.sees:
                seen += other.tokens[skip:]
            elif other is trunks[-1]:
                # Of its own plan a part reads no entry behind its own.
                begins, number = other.entries.begins, lane.part.number
                seen += other.tokens[skip : begins[number] if number < len(begins) else None]
            skip = 0
        return seen + lane.tokens[skip:]

    # Bounds.

    def _rounds_left(self) -> bool:
        switched = bool(self.canvas.lanes[0].hidden)  # True: the switch was put behind the prompt
        return switched and not self.given and len(self.rounds) < self.settings.max_rounds

    def _fresh(self, lane: Lane) -> bool:
        """True: nothing was written behind the tokens that opened the segment."""
        return bool(lane.hidden) and len(lane.tokens) == lane.hidden[0][1] and self.states[lane].stage == "text"
