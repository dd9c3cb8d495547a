"""Parts: the lanes of a round, made from its plan.

Where a part begins, how long it may become, what it reads, and how it is reported. When a round begins and what follows
it is `hf_hybrid.decoding.writers.planned_diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hf_hybrid.config import PlannedDiffusionSettings
from hf_hybrid.core.canvas import Canvas
from hf_hybrid.core.grammars import Grammar
from hf_hybrid.core.lane import AcceptRule, Bounds, Lane, PlannedPart, Window
from hf_hybrid.core.plan import Plan
from hf_hybrid.decoding.output import DecodingError, GenerationReport, SpanReport
from hf_hybrid.models.runner import Runner


@dataclass(eq=False)
class Round:
    """A round that has begun.

    Attributes:
        trunk: the lane that holds its plan. begin: index of the plan's first token there. plan: as far as it is
        settled. lanes: of the parts that have begun (a dense round: its one canvas until that is full).
        whole: True: the plan is complete.
    """

    trunk: Lane
    begin: int
    plan: Plan
    lanes: list[Lane] = field(default_factory=list[Lane])
    whole: bool = False


class Parts:
    """Makes lanes for the parts of rounds.

    Args:
        settings: of the call. grammar: of the plans. runner: learns what a part reads.
    """

    def __init__(self, settings: PlannedDiffusionSettings, grammar: Grammar, runner: Runner):
        self.settings, self.grammar, self.runner = settings, grammar, runner
        self.window = settings.window_length if settings.span_decoding == "diffusion" else 0
        self.rule = AcceptRule(
            checked=settings.verify_spans,
            draft_threshold=settings.draft_threshold,
            threshold=settings.confidence_threshold,
            selection=settings.selection,
            steps=settings.max_denoising_steps,
            commit=settings.commit,
            fallback=settings.span_fallback_confidence,
        )

    def start(self, canvas: Canvas, current: Round) -> None:
        """Lanes for the parts of the plan that have none.

        Each may outgrow its plan, however much room the answer has: it is cut in text order, so that a part does not
        depend on where. Parts whose text is given are finished; their rows ride in the next pass.
        """
        settings, grammar, trunk, plan, lanes = self.settings, self.grammar, current.trunk, current.plan, current.lanes
        if len(lanes) == len(plan.spans):
            return
        related = plan.depends("sparse" if settings.visibility == "sparse" else "dag").tolist()
        starts = grammar.starts(plan, trunk.start + current.begin)
        for number in range(len(lanes), len(plan.spans)):
            span = plan.spans[number]
            opening = list(grammar.opening(span))
            lane = Lane("span", trunk.span + 1 + 2 * number, starts[number], opening, rule=self.rule)
            depends = tuple(lanes[k] for k, reads in enumerate(related[number][:number]) if reads)
            lane.part = PlannedPart(number, len(opening), span.length, depends)
            lane.hidden, lane.window = [(0, grammar.silent(span))], Window(self.window)
            longest = len(opening) + math.ceil(span.length * settings.max_span_extension)
            lane.bounds = Bounds(longest, canvas.positions)
            entries, read = trunk.entries, (other.span for other in depends)
            self.runner.relate(canvas.line, lane.span, [*entries.sees, trunk.span, *entries.spans[:number], *read])
            if span.text is not None:
                lane.tokens += span.text
                lane.finish("given")
            last = canvas.positions - lane.start
            if len(lane.tokens) > last - (span.text is None):  # no position for a token of its text
                del lane.tokens[max(last, 0) :]
                lane.finish("length")
            lanes.append(lane)
            canvas.lanes.append(lane)
        canvas.num_spans = trunk.span + 2 * len(lanes)

    def start_dense(self, canvas: Canvas, current: Round) -> None:
        """The whole round as one block; openings are given, everything else is open."""
        before = list(range(canvas.num_spans))
        rule = replace(self.rule, checked=False, commit="block", fallback=None)
        lane = Lane("canvas", canvas.new_span(), current.trunk.end, [], rule=rule, part=PlannedPart())
        fills: list[int | None] = []
        for span in current.plan.spans:
            fills += [*self.grammar.opening(span), *[None] * span.length]
        del fills[canvas.positions - lane.start :]
        lane.window, lane.bounds = Window(len(fills), fills), Bounds(len(fills))
        self.runner.relate(canvas.line, lane.span, before)
        canvas.lanes.append(lane)
        current.lanes.append(lane)

    def split(self, canvas: Canvas, current: Round, lane: Lane) -> None:
        """A filled dense round becomes one finished lane per part; they go into the cache as clean rows of one span."""
        grammar, plan, lanes = self.grammar, current.plan, current.lanes
        at = canvas.lanes.index(lane)
        lanes.clear()
        for number, (span, start) in enumerate(zip(plan.spans, grammar.dense_starts(plan, lane.start), strict=True)):
            begin = start - lane.start
            text = begin + len(grammar.opening(span))
            body = lane.tokens[text : text + span.length]
            ended = grammar.part_end in body
            body = body[: body.index(grammar.part_end)] if ended else body
            part = Lane("span", lane.span, start, [*lane.tokens[begin:text], *body], hidden=[(0, grammar.silent(span))])
            passes = lane.part.passes if lane.part is not None else 0
            part.part = PlannedPart(number, text - begin, span.length, passes=passes)
            part.finish("end" if ended else "limit" if len(body) == span.length else "length")
            lanes.append(part)
        canvas.lanes[at : at + 1] = lanes


def report_parts(report: GenerationReport, number: int, current: Round) -> None:
    """Report the plan of round ``number`` (from 1) and its parts as they are in the answer; nothing, when the answer
    was cut before the first of them."""
    plan, lanes = current.plan, current.lanes
    if not any(lane.tokens for lane in lanes):
        return
    if not current.whole:  # how far it was planned by then is chance: what is in the answer is not
        lanes = [lane for lane in lanes if lane.tokens]
        plan = Plan(plan.spans[: len(lanes)], plan.lead)
    report.plans.append(plan)
    for part, (span, lane) in enumerate(zip(plan.spans, lanes, strict=True)):
        text, passes = lane.tokens[lane.opening :], lane.part.passes if lane.part is not None else 0
        extended = len(text) > span.length and lane.reason != "given"
        report.spans.append(
            SpanReport(number, part, span.label, span.depends, span.length, text, passes, extended, lane.reason)
        )
        name = f"part {part + 1} of round {number}"
        if extended:
            report.fallbacks.append(f"{name} was extended from {span.length} to {len(text)} tokens")
        if lane.reason in ("limit", "length"):
            report.fallbacks.append(f"{name} was cut at {len(text)} tokens")


def check_plans(
    plans: Plan | Sequence[Plan] | None,
    settings: PlannedDiffusionSettings,
    grammar: Grammar,
    ends: frozenset[int],
) -> tuple[Plan, ...]:
    """The plans that a call brings, one per round.

    Args:
        ends: ids that end an answer.

    Raises:
        DecodingError: they are no plans, or cannot be carried out with these settings.
        PlanError: a plan is out of the limits.
    """
    if plans is None:
        return ()
    given = (plans,) if isinstance(plans, Plan) else tuple(plans) if isinstance(plans, Sequence) else ()
    if not given or not all(isinstance(plan, Plan) for plan in given):
        raise DecodingError("plan= takes a hf_hybrid.Plan, or one per round")
    if len(given) > settings.max_rounds:
        raise DecodingError(f"{len(given)} plans are more than max_rounds={settings.max_rounds}")
    for plan in given:
        grammar.check(plan)
        if any(ends.intersection((*plan.lead, *span.label, *(span.text or ()))) for span in plan.spans):
            raise DecodingError("the plan holds an id that ends an answer (eos_token_id); leave it out of its texts")
        if settings.visibility == "dense" and any(span.text is not None for span in plan.spans):
            raise DecodingError("visibility='dense' writes a whole round at once; leave the given texts out")
        longest = grammar.lengths[-1]
        odd = [span.length for span in plan.spans if span.length > longest]
        if odd:
            raise DecodingError(f"a part of {odd[0]} tokens is longer than the longest length token ({longest})")
    return given


def check_room(plans: Sequence[Plan], grammar: Grammar, canvas: Canvas, dense: bool) -> None:
    """Refuse given plans whose own tokens do not fit, whatever is written for them. Planned lengths are guesses: an
    answer that needs them all is cut instead.

    Args:
        dense: True: a round takes all of its planned positions.

    Raises:
        DecodingError: too many tokens for ``max_new_tokens``, or more positions than the model has.
    """
    needed, end = 0, len(canvas.prompt)
    for number, plan in enumerate(plans):
        opened = len(grammar.resume if number else grammar.switch)
        parts = [len(grammar.opening(span)) + len(span.text or ()) for span in plan.spans]
        silent = sum(grammar.silent(span) for span in plan.spans)
        entries = len(grammar.render(plan))
        needed += len(plan.lead) + sum(parts) - silent
        needed += (opened + entries + silent) * canvas.control
        begin = end + opened + len(plan.lead)
        end = begin + entries
        if dense:
            end += grammar.total(plan.spans)
        else:
            starts = grammar.starts(plan, begin)
            end = max(end, *(start + size for start, size in zip(starts, parts, strict=True)))
    if needed > canvas.budget:
        raise DecodingError(
            f"the given plan alone holds {needed} tokens, and max_new_tokens leaves {canvas.budget}; raise it"
        )
    if plans and end > canvas.positions:
        raise DecodingError(
            f"the given plan needs {end} positions and the model has {canvas.positions}; shorten the plan or the prompt"
        )
