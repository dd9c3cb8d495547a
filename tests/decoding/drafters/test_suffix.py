"""SuffixDrafter: what it copies, from where, and what it remembers.

Bugs these tests catch: a copy that begins one token early or late, that runs out where a loop goes on, or that stops at
a replaced word; a memory that is asked too late or keeps unfinished texts; successors taken from the wrong row.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_hybrid import Draft, SuffixDrafter, SuffixMemory, Text
from tests.models_for_tests import CONTROL, VOCAB, hybrid, writer

NOBODY: Any = None


def begun(tokens: list[int], **options: Any) -> tuple[SuffixDrafter, Text]:
    drafter, text = SuffixDrafter(**options), Text(0, list(tokens), len(tokens), room=100)
    drafter.prepare(None, VOCAB, 1)
    drafter.begin(text)
    return drafter, text


def drafted(drafter: SuffixDrafter, text: Text, length: int = 8) -> list[int]:
    (draft,) = drafter.propose([text], length, NOBODY)
    return list(draft.tokens)


def test_the_continuation_of_the_longest_match() -> None:
    # "1 2" occurs twice before; only the first time "9" is in front.
    drafter, text = begun([9, 1, 2, 3, 4, 8, 1, 2, 5, 6, 9, 1, 2])
    assert drafted(drafter, text, 2) == [3, 4]
    text.room = 1
    assert drafted(drafter, text, 2) == [3]


def test_a_loop_goes_on() -> None:
    drafter, text = begun([5, 1, 2, 3, 1, 2, 3, 1])
    assert drafted(drafter, text) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_behind_a_replaced_word_the_copy_goes_on() -> None:
    drafter, text = begun([1, 2, 3, 4, 5, 6, 7, 8, 1, 2])
    (draft,) = drafter.propose([text], 4, NOBODY)
    assert list(draft.tokens) == [3, 4, 5, 6]
    # The model writes 3, then 20 where 4 accepted: 5 is expected next.
    drafter.learn(text, draft, 1, [3, 20])
    text.tokens += [3, 20]
    (draft,) = drafter.propose([text], 3, NOBODY)
    assert list(draft.tokens) == [5, 6, 7] and draft.bucket == "resumed"
    # It is rejected: the copy is given up.
    drafter.learn(text, draft, 0, [30])
    text.tokens += [30]
    assert drafted(drafter, text) == []


def test_behind_a_left_out_word_the_copy_goes_on() -> None:
    drafter, text = begun([1, 2, 3, 4, 5, 6, 4, 9, 1, 2])
    (draft,) = drafter.propose([text], 4, NOBODY)
    assert list(draft.tokens) == [3, 4, 5, 6]
    drafter.learn(text, draft, 0, [4])
    text.tokens += [4]
    # "4" occurs twice; the copy was from the first, and 3 was left out.
    assert drafted(drafter, text, 2) == [5, 6]


def test_successors_that_the_model_gave() -> None:
    drafter, text = begun([1, 2, 3])
    assert drafted(drafter, text) == []
    drafter.learn(text, Draft([7, 8]), 0, [4, 9, 5])  # behind 3: 4; behind the wrong 7: 9; behind 8: 5
    text.tokens += [4]
    assert drafted(drafter, text) == []
    text.tokens += [7]
    assert drafted(drafter, text) == [9]
    drafter.learn(text, Draft([9]), 1, [9, 8])
    text.tokens += [9, 8]
    assert drafted(drafter, text) == [5]
    without, same = begun([1, 2, 3], recycle=False)
    without.learn(same, Draft([7, 8]), 0, [4, 9, 5])
    same.tokens += [4, 7]
    assert drafted(without, same) == []


def test_the_memory_is_asked_and_filled() -> None:
    memory = SuffixMemory()
    drafter, text = begun([1, 2, 3], memory=memory)
    text.tokens += [4, 5]
    drafter.end(text)
    assert memory.texts == [[1, 2, 3, 4, 5]]
    drafter.prepare(None, VOCAB, 1)
    again = Text(0, [9, 2, 3], 3, room=9)
    drafter.begin(again)
    assert drafted(drafter, again) == [4, 5], "to the end of the text in the memory, not into the next one"
    drafter.prepare(None, VOCAB, 1)  # the call was interrupted: nothing is kept
    drafter.end(again)
    assert len(memory.texts) == 1


def test_a_match_at_the_end_of_a_remembered_text_gives_way_to_the_text_itself() -> None:
    memory = SuffixMemory()
    memory.bind(VOCAB)
    memory.add([7, 8, 1, 2, 3])  # nothing follows the longest match
    drafter, text = begun([2, 3, 30, 31, 8, 1, 2, 3], memory=memory)
    assert drafted(drafter, text, 2) == [30, 31]


def test_a_second_call_copies_the_first() -> None:
    model, ids = writer(False), torch.tensor([[3, 7, 9, 2, 11]])
    memory = SuffixMemory()
    options = {"strategy": "speculative", "max_new_tokens": 40, "adaptive": False, "return_dict_in_generate": True}
    first, second = (model.generate(ids, drafter=SuffixDrafter(memory), **options) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    assert memory.texts == [first.sequences[0].tolist()], "the same text once"
    # 40 tokens, 24 drafted a pass: the prompt with one token, then 25 and the rest.
    assert second.report[0].num_forwards <= 4 < first.report[0].num_forwards
    assert hybrid(favours={CONTROL.noise.end: 0.0}).config.vocab_size == memory.vocab_size
