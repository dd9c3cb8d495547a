"""Settling: what a pass adds to one lane, and what the lane drafts for the next."""

from __future__ import annotations

from collections.abc import Sequence

from hf_hybrid.core.lane import Drafted, Lane
from hf_hybrid.decoding.denoise import Proposal, fill, note_confidence
from hf_hybrid.decoding.passes import LaneRows, Pass
from hf_hybrid.decoding.scoring import Scored
from hf_hybrid.decoding.verify import check_lane, path_of
from hf_hybrid.decoding.writer import Writer


def settle(writer: Writer, rows: LaneRows, batch: Pass, scored: Scored) -> None:
    """Accept what was drafted, as far as the clean rows write the same; settle or draft what the window proposes."""
    lane, drafted = rows.lane, rows.lane.drafted
    new, path = _accepted(lane, checked := writer.check(rows, batch, scored))
    writer.accepted(lane, len(path), checked)
    fed_again = bool(rows.checks) and not new  # without a token the row in front of it must be
    lane.cached += rows.fed + len(path) - fed_again
    kept = {*rows.checks[: not fed_again], *(rows.checks[1 + node] for node in path)}
    batch.rejected += [(rows.line, column) for column in rows.checks if column not in kept]
    if drafted.parents:
        batch.moved += [(rows.line, rows.checks[1 + node], lane.span) for node in path]
    if drafted.tokens:
        writer.report.accepted_per_round.append(len(path))
    new, proposed = _proposed(writer, rows, new, len(path), scored.proposals.get(rows), fed_again)
    lane.drafted = Drafted(ending=drafted.ending)
    before = len(lane.tokens)
    lane.settle(new, writer.terminators(lane))
    _transcribe(writer, rows, batch, scored, [0, *(1 + node for node in path)], before)
    writer.settled(lane, lane.tokens[before:])
    if lane.done:
        return
    if len(lane.tokens) >= lane.most:
        lane.finish_full()
        writer.settled(lane, [])
    else:
        lane.drafted.tokens = writer.draft(lane, proposed)


def _accepted(lane: Lane, checked: list[int]) -> tuple[list[int], Sequence[int]]:
    """Tokens that the clean rows add, and the indices of the accepted ones among the drafted."""
    drafted = lane.drafted
    if drafted.parents:
        path = path_of(drafted.parents, drafted.tokens, checked)
        return list(checked[: len(path) + 1]), path
    new, accepted = check_lane(drafted.tokens, checked)
    return new, range(accepted)


def _proposed(
    writer: Writer, rows: LaneRows, new: list[int], accepted: int, proposal: Proposal | None, fed_again: bool
) -> tuple[list[int], list[int]]:
    """The tokens that the pass settles, and what is proposed behind them.

    Args:
        new: of the clean rows, of which ``accepted`` were drafted. fed_again: True: they wrote none, and will be read
            again.
    """
    lane = rows.lane
    draft, rule = lane.drafted.tokens, lane.rule
    if accepted < len(draft) or fed_again:  # the window is behind a token that was rejected
        guesses = writer.guesses(lane)
        if not new or fed_again or not {draft[accepted], new[-1]} <= guesses:
            return new, []
        behind = proposal.sure(0, rule.draft_threshold, guesses) if proposal is not None else []
        return new, draft[accepted + 1 :] + behind
    if proposal is None:
        return new, []
    if rule.checked:
        proposed = proposal.draft(new[-1], rule.draft_threshold, writer.guesses(lane))
    else:
        new, proposed = fill(lane, new, proposal, writer.close), []
    if note_confidence(lane, proposal):
        number = lane.part.number if lane.part is not None else 0
        writer.report.fallbacks.append(f"part {number + 1} went on {lane.window.fallback}")
    return new, proposed


def _transcribe(writer: Writer, rows: LaneRows, batch: Pass, scored: Scored, wrote: Sequence[int], before: int) -> None:
    """Keep what the rows said that wrote ``lane.tokens[before:]``; ``wrote``: of each its number in ``checks``."""
    transcript = writer.context.transcript
    if transcript is None:
        return
    for number, check in enumerate(wrote[: len(rows.lane.tokens) - before]):
        place = batch.flat(rows.line, rows.checks[check])
        logits = scored.unbiased[place] if scored.unbiased is not None else None
        scores = rows.in_order[number] if rows.in_order else scored.processed[place]
        transcript.note(rows.lane, before + number, logits, scores if transcript.scores else None)
