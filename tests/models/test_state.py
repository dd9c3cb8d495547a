"""Theorem 13: what a state is after accepting n of m drafted tokens, it is after reading those n alone.

Bugs these tests catch: a rejected row that stays in a state, in a convolution or among the keys; layers that go back to
different places; accepted rows that are lost, or read twice; padding that enters a state; a sequence that takes the
state of a neighbour or of one that left; several rows at once behind a state that the model's scan would forget.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_hybrid.core.rows import PADDING, Rows
from hf_hybrid.models.host import Unsupported
from hf_hybrid.models.opening import runner_of
from hf_hybrid.models.state import REREAD, StateRunner
from hf_hybrid.models.states import States
from tests.models_for_tests import VOCAB, tiny
from tests.state_models import COUNTED, EVERY, OWN_CACHE, STATEFUL, STEPS, stateful

Line = tuple[list[int], int]  # tokens, position of the first


def run(runner: StateRunner, lines: list[Line], keep: int, left: bool = True) -> Tensor:
    """One pass; shorter lines are padded, on the left or on the right."""
    width = max(len(tokens) for tokens, _ in lines)
    ids, places, spans = [], [], []
    for tokens, begin in lines:
        pad = [0] * (width - len(tokens))
        place = list(range(begin, begin + len(tokens)))
        parts = [(pad, pad, [PADDING] * len(pad)), (tokens, place, [0] * len(tokens))]
        (a, b, c), (d, e, f) = parts if left else parts[::-1]
        ids.append(a + d)
        places.append(b + e)
        spans.append(c + f)
    return runner.run(torch.tensor(ids), Rows.clean(torch.tensor(places), torch.tensor(spans)), keep).logits


def stepwise(model: Any, text: list[int], prompt: int) -> tuple[Tensor, list[States]]:
    """Logits ``(rows, vocab)`` of a text that is read token by token behind its prompt, and the states behind each."""
    runner = StateRunner(model, 1)
    logits, states = [run(runner, [(text[:prompt], 0)], prompt)[0]], []
    runner.commit()
    for i in range(prompt, len(text)):
        states.append(States.of(runner._held[0].cache, i))
        logits.append(run(runner, [(text[i : i + 1], i)], 1)[0])
        runner.commit()
    return torch.cat(logits), states


def tolerance(model: Any, name: str, logits: Tensor) -> float:
    """Rounding alone: parts of the linear layers are float32 whatever the dtype; 1e-7 relative each, over many tokens
    and layers. What a rejected token does is a hundred times as much at least (the last test)."""
    exact = model.dtype == torch.float64 and name in ("lfm2", "bart", "falcon alibi")
    return (1e-10 if exact else 1e-3) * float(logits.std())


def equal_states(found: States, expected: States) -> None:
    for own, other in zip(found.layers, expected.layers, strict=True):
        for mine, theirs in zip(own[:2], other[:2], strict=True):
            for key, tensor in mine.items():
                if tensor is not None:
                    scale = float(theirs[key].abs().max())
                    torch.testing.assert_close(tensor, theirs[key], rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize("name", EVERY)
def test_after_a_rejection_it_is_as_if_the_accepted_rows_were_read_alone(name: str) -> None:
    """Two sequences of unequal lengths, padded on either side, random drafts of which a random part is accepted."""
    model, choose = stateful(name), random.Random(5)
    texts = [[choose.randrange(VOCAB) for _ in range(64)] for _ in range(2)]
    prompts = [7, 3]
    expected = [stepwise(model, text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
    runner = StateRunner(model, 2)
    run(runner, [(text[:prompt], 0) for text, prompt in zip(texts, prompts, strict=True)], 1)
    runner.commit()
    held, behind = list(prompts), 0
    while min(held) < 56:
        lines, accepted = [], []
        for text, at in zip(texts, held, strict=True):
            size = choose.randint(1, 5) if at < 56 else 1
            accepted.append(choose.randint(0, size) if at < 56 else 0)
            wrong = [(token + 1) % VOCAB for token in text[at + accepted[-1] : at + size]]
            lines.append((text[at : at + accepted[-1]] + wrong, at))
        keep, left = max(len(tokens) for tokens, _ in lines), choose.random() < 0.5
        logits = run(runner, lines, keep, left)
        kept = torch.zeros((2, keep), dtype=torch.bool)
        for line, ((tokens, at), count) in enumerate(zip(lines, accepted, strict=True)):
            first = keep - len(tokens) if left else 0
            kept[line, first : first + count] = True
            want = expected[line][0][at : at + count]
            most = tolerance(model, name, expected[line][0])
            torch.testing.assert_close(logits[line, first : first + count], want, rtol=0, atol=most)
            held[line] += count
        runner.commit(kept)
        for line, sequence in enumerate(runner._held):
            assert runner.committed(line).position.tolist() == [list(range(held[line]))]
            assert sequence.read <= held[line], "nothing that was rejected is held"
            behind = max(behind, held[line] - sequence.read)
            if sequence.read >= prompts[line]:
                own = States.of(sequence.cache, sequence.read)
                equal_states(own, expected[line][1][sequence.read - prompts[line]])
    assert (behind > 0) == (name in STATEFUL), "accepted rows are read again where there is a state, and only there"
    assert behind <= REREAD + 5


def test_rows_are_not_read_again_and_again() -> None:
    model = stateful("lfm2")
    runner = StateRunner(model, 1)
    run(runner, [(list(range(40)), 0)], 1)
    runner.commit()
    for step in range(30):  # one of three is accepted, every time
        run(runner, [([step, 1, 2], 40 + step)], 3)
        runner.commit([[True, False, False]])
    assert runner.num_rows[0] < 40 + 30 * (3 + REREAD) and runner.num_passes[0] <= 1 + 30 + 30 // REREAD
    # A draft that rides along with the prompt: the prompt is not read again for it.
    runner = StateRunner(model, 1)
    run(runner, [([*range(40), 7, 8], 0)], 3)
    runner.commit([[True] * 40 + [False] * 2])
    run(runner, [([9], 40)], 1)
    assert runner.num_rows[0] == 42 + 1 + 1


@pytest.mark.parametrize("name", sorted({"qwen3.5", "mamba-2", "bloom"} & set(EVERY)))
def test_rewound_abandoned_left_and_entered(name: str) -> None:
    model = stateful(name)
    text = [(3 * i + 1) % VOCAB for i in range(30)]
    expected = stepwise(model, text, 4)[0]
    most = tolerance(model, name, expected)
    runner = StateRunner(model, 3)
    run(runner, [(text[:5], 0), (text[3:9], 0), (text[:2], 0)], 1)
    runner.commit()
    run(runner, [([9, 9, 9], 5), ([8], 6), ([7, 7], 2)], 3)  # never committed
    run(runner, [(text[5:9], 5), ([8], 6), (text[2:4], 2)], 2)
    runner.commit()
    runner.rewind(0, 7)
    assert runner.leave(1) == 2 and runner.committed(1).span.shape == (1, 4)
    found = run(runner, [(text[7:9], 7), (text[4:6], 4)], 2)
    torch.testing.assert_close(found[0], expected[7:9], rtol=0, atol=most)
    torch.testing.assert_close(found[1], expected[4:6], rtol=0, atol=most)
    with pytest.raises(ValueError, match="commit"):
        runner.rewind(0, 3)
    runner.commit()
    assert runner.enter() == 2 and runner.num_rows[2] == 0
    found = run(runner, [([1], 9), ([1], 6), (text[:5], 0)], 5)
    torch.testing.assert_close(found[2], expected[:5], rtol=0, atol=most)


def test_a_row_that_cannot_be_is_refused() -> None:
    runner = StateRunner(stateful("bart"), 1)
    with pytest.raises(ValueError, match="positions from 0 on"):
        run(runner, [([1, 2], 1)], 1)
    position = torch.tensor([[0, 1]])
    noisy = Rows(position, position * 0, position == 1, position, position)
    with pytest.raises(ValueError, match="no noisy rows"):
        runner.run(position, noisy, 1)
    with pytest.raises(Unsupported, match="no spans"):
        runner.relate(0, 1, [0])
    run(runner, [([1, 2], 0)], 1)
    with pytest.raises(ValueError, match="a chain"):
        runner.commit([[False, True]])
    with pytest.raises(ValueError, match=r"run\(\) first"):
        StateRunner(runner.model, 1).commit()


def test_who_is_served_by_it() -> None:
    for name in (*STATEFUL, *COUNTED):
        assert runner_of(stateful(name)) is StateRunner
        assert StateRunner(stateful(name), 1).abilities.drafts == (name not in STEPS)
    assert runner_of(tiny("llama")) is not StateRunner
    for name in OWN_CACHE:
        with pytest.raises(Unsupported, match="takes no cache"):
            runner_of(stateful(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RwkvConfig, RwkvForCausalLM
    small: Any = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    with pytest.raises(Unsupported, match=r"states inside its layers.*leave out strategy="):
        runner_of(RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**small, intermediate_size=32)))
    with pytest.raises(Unsupported, match="takes no cache"):
        runner_of(RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)))


@torch.no_grad()
def test_the_tests_can_tell() -> None:
    """A rejected token that stayed would show: it moves the logits by more than rounding may."""
    for name in STATEFUL:
        model, text = stateful(name), [5, 9, 3, 7, 20]
        logits = [StateRunner(model, 1) for _ in range(2)]
        found = [run(r, [([5, 9, *wrong, 3, 7, 20], 0)], 1)[0, -1] for r, wrong in zip(logits, ([], [30]), strict=True)]
        assert text and float((found[0] - found[1]).abs().max()) > 0.1 * float(found[0].std()), name
