"""The plan grammar as a logits processor of the host's own ``generate()``.

Catches: a plan beyond a cap or the room, or one that is cut off; tags of the prompt read as a plan; a state kept for
the wrong sequence after beams changed their order; a parse from scratch at every token; sequences left without any
token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from hf_hybrid.core.grammars.native import NativeGrammar
from hf_hybrid.decoding.processors import PlanLogitsProcessor, ProcessorError
from tests.decoding.tagged_prompts import GRAMMAR, LIMITS, MASK, PAD, PROMPT, ROOM, TAGS, TOKENS
from tests.models_for_tests import VOCAB, tiny


class Reparsed(LogitsProcessor):
    """The oracle: parses every sequence from scratch at every call, checks the processor by it, returns its scores."""

    def __init__(self, processor: PlanLogitsProcessor):
        self.processor, self.room = processor, processor.max_new_tokens
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = self.processor(input_ids, scores)
        for ids, before, after in zip(input_ids.tolist(), scores, out, strict=True):
            new = ids[self.processor.prompt_length :]
            if TOKENS.noise.end in new:
                assert torch.equal(before, after)
                continue
            allowed = self.allowed(new)
            # Bans of other processors stay, unless nothing would be left.
            allowed = {token for token in allowed if before[token] > -torch.inf} or allowed
            assert [score > -torch.inf for score in after.tolist()] == [token in allowed for token in range(VOCAB)]
        self.calls += 1
        return out

    def allowed(self, new: list[int]) -> set[int]:
        left = None if self.room is None else self.room - len(new)
        try:
            state, read = GRAMMAR.parse(new)
        except ValueError:
            return {TOKENS.noise.end}
        if state.stage == "written" or read < len(new) or (state.stage == "text" and left == 1):
            return {TOKENS.noise.end}
        text, control = GRAMMAR.choices(state, room=left)
        return set(control) | (set(range(VOCAB)) - {*TOKENS.noise.banned, TOKENS.noise.end} if text else set())


def write(**arguments: Any) -> tuple[Tensor, Reparsed]:
    """The host's ``generate()`` on three prompts, with a bias that makes plans likely."""
    checked = Reparsed(PlanLogitsProcessor(GRAMMAR, PROMPT.shape[1], max_new_tokens=ROOM))
    # 53 is the length above its cap: the model must want it and not get it.
    bias = [[[TAGS.topic], 4.0], [[52], 2.0], [[53], 6.0], [[TAGS.depends[0]], 2.0]]
    out = tiny("llama").generate(
        PROMPT, attention_mask=MASK, max_new_tokens=ROOM, eos_token_id=TOKENS.noise.end, pad_token_id=PAD,
        sequence_bias=bias, logits_processor=LogitsProcessorList([checked]), **arguments,
    )  # fmt: skip
    assert checked.calls > 0
    return out, checked


def check_answer(new: list[int]) -> tuple[int, ...]:
    """Check every rule on the new tokens of one row, and return the label lengths of its plan (none without one)."""
    end = new.index(TOKENS.noise.end)  # every answer ends with one
    assert all(token == PAD for token in new[end + 1 :])
    answer = new[:end]
    state, read = GRAMMAR.parse(answer)
    assert read == len(answer)
    plan = PlanLogitsProcessor.read_plan(torch.tensor([1, 47, *new]), GRAMMAR, 2)
    if state.stage == "text":
        assert plan is None
        return ()
    assert state.stage == "written" and answer[-1] == TAGS.async_
    assert plan is not None and plan == state.plan
    GRAMMAR.check(plan)
    assert answer.index(TAGS.topic) + len(GRAMMAR.render(plan)) + GRAMMAR.total(state.parts) <= ROOM
    return tuple(len(span.label) for span in plan.spans)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
        # min_new_tokens bans eos where the grammar allows nothing else.
        {"do_sample": True, "num_return_sequences": 4, "top_k": 0, "temperature": 1.5, "min_new_tokens": 12},
        {"do_sample": True, "num_return_sequences": 2, "num_beams": 2, "top_k": 5},
    ],
    ids=["greedy", "beams", "sampling", "sampled beams"],
)
def test_the_host_writes_plans(arguments: dict[str, Any]) -> None:
    out, _ = write(**arguments)
    plans = [check_answer(new) for new in out[:, PROMPT.shape[1] :].tolist()]
    written = [labels for labels in plans if labels]
    assert len(written) > 0
    if "temperature" in arguments:
        # Twelve rows: the caps are reached, so a grammar without them would have gone further.
        assert max(map(len, written)) >= 2 and max(map(max, written)) == LIMITS.max_label_length


def test_a_text_ends_inside_the_room() -> None:
    processor = PlanLogitsProcessor(GRAMMAR, 1, max_rounds=0, max_new_tokens=4)
    for length in range(1, 5):
        finite = processor(torch.full((1, length), 3), torch.zeros(1, VOCAB))[0] == 0
        assert bool(finite[TOKENS.noise.end]) and not finite[TAGS.topic]
        assert bool(finite[3]) == (length < 4)


def test_tags_of_the_prompt_change_nothing() -> None:
    plain = torch.tensor([[3, 3, 3, 3, 47, 5]])  # (1, 6)
    tagged = torch.tensor([[47, 3, 51, 48, 47, 5]])  # (1, 6)
    scores = torch.randn(1, VOCAB)
    out, same = (PlanLogitsProcessor(GRAMMAR, 4)(ids, scores) for ids in (plain, tagged))
    assert torch.equal(out, same) and out[0, 51].isfinite() and not out[0, TOKENS.noise.end].isfinite()
    assert PlanLogitsProcessor.read_plan(tagged[0], GRAMMAR, 4) is None


def test_a_call_advances_over_new_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    advance = NativeGrammar.advance
    monkeypatch.setattr(NativeGrammar, "advance", lambda *args: steps.append(args[2]) or advance(*args))
    processor = PlanLogitsProcessor(GRAMMAR, 1)
    scores = torch.zeros(2, VOCAB)
    first, second = [9, 47, 3, 52], [9, 5, 5, 47]
    processor(torch.tensor([first, second]), scores)
    assert len(steps) == 6
    # Beams: both sequences change their order and grow by one.
    processor(torch.tensor([[*second, 4], [*first, 47]]), scores)
    assert steps[6:] == [4, 47]
    assert processor.state(0).label == (4,) and processor.state(1).parts[0].length == 4
    # Both beams go on from the second; the same call again costs nothing.
    again = torch.tensor([[*first, 47, 7], [*first, 47, 8]])
    processor(again, scores)
    processor(again, scores)
    assert steps[8:] == [7, 8] and processor.state(1).label == (8,)
    # Another prompt, and a prefix that was never seen: neither inherits anything.
    processor(torch.tensor([[1], [2]]), scores)
    assert processor.state(0).stage == "text" and steps[10:] == []
    processor(torch.tensor([[9, 47, 5], [9, 5, 6]]), scores)
    assert processor.state(0).label == (5,) and processor.state(1).stage == "text"


def test_no_row_is_left_without_a_token() -> None:
    processor = PlanLogitsProcessor(GRAMMAR, 0)
    plan = [47, 3, 51, 48]
    scores = torch.randn(3, VOCAB)
    scores[:, TOKENS.noise.end] = -torch.inf  # as min_new_tokens does
    # Finished and padded, written, off the grammar.
    out = processor(torch.tensor([[*plan, 45, PAD], [5, 5, *plan], [5, 49, 5, 5, 5, 5]]), scores)
    assert torch.equal(out[0], scores[0])
    only_eos = torch.full((VOCAB,), -torch.inf).index_fill(0, torch.tensor(TOKENS.noise.end), 0.0)  # (VOCAB,)
    assert torch.equal(out[1], only_eos) and torch.equal(out[2], only_eos)


def test_misuse_names_the_fix() -> None:
    with pytest.raises(ProcessorError, match=r"pass input_ids\.shape\[1\]"):
        PlanLogitsProcessor(GRAMMAR, -1)
    ids = torch.zeros(1, 2, dtype=torch.long)  # (1, 2)
    with pytest.raises(ProcessorError, match="new PlanLogitsProcessor"):
        PlanLogitsProcessor(GRAMMAR, 3)(ids, torch.zeros(1, VOCAB))
    with pytest.raises(ProcessorError, match=r"vocab_size=model\.config\.vocab_size"):
        PlanLogitsProcessor(GRAMMAR, 1)(ids, torch.zeros(1, VOCAB + 3))
