"""The host's processors split for rows that are written in parallel.

Catches: a user's class, or one that reads the prefix, run on rows without a prefix; processors out of order; bans that
do not survive the list; the padding, constraint or memory of one sequence of a batch applied to another.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as host

from hf_hybrid.decoding import DecodingError
from hf_hybrid.decoding.processors import PlanLogitsProcessor, ProcessorError, Processors
from tests.decoding.tagged_prompts import GRAMMAR, MASK, PAD, PROMPT, TOKENS
from tests.models_for_tests import VOCAB, tiny


def split(*processors: Any, verified: bool = False, prompt_length: int = 4) -> Processors:
    return Processors(LogitsProcessorList(processors), verified=verified, prompt_length=prompt_length)


class Heated(host.TemperatureLogitsWarper):
    """A user's class, whose base reads the scores alone."""


def prefix_free() -> list[Any]:
    return [
        host.SequenceBiasLogitsProcessor([[[4], 1.5], [[5], -2.0]]),
        host.NoBadWordsLogitsProcessor([[3], [7]]),
        host.SuppressTokensLogitsProcessor([1, 2]),
        host.TemperatureLogitsWarper(0.7),
        host.TopHLogitsWarper(0.9),
        host.TopKLogitsWarper(30),
        host.TopPLogitsWarper(0.95),
        host.MinPLogitsWarper(0.02),
        host.TypicalLogitsWarper(0.95),
        host.EpsilonLogitsWarper(0.01),
        host.EtaLogitsWarper(0.01),
        host.LogitNormalization(),
    ]


def with_prefix() -> list[Any]:
    ids = torch.tensor([[1, 2, 3]])  # (1, 3)
    return [
        host.RepetitionPenaltyLogitsProcessor(1.3),
        host.EncoderRepetitionPenaltyLogitsProcessor(1.3, ids),
        host.NoRepeatNGramLogitsProcessor(2),
        host.EncoderNoRepeatNGramLogitsProcessor(2, ids),
        host.SequenceBiasLogitsProcessor([[[4], 1.5], [[4, 5], 1.5]]),
        host.NoBadWordsLogitsProcessor([[3], [3, 4]]),
        host.PrefixConstrainedLogitsProcessor(lambda _, ids: [1], 1),
        host.ForcedBOSTokenLogitsProcessor(1),
        host.ForcedEOSTokenLogitsProcessor(9, 45),
        host.ExponentialDecayLengthPenalty((1, 1.1), 45, 3),
        host.SuppressTokensAtBeginLogitsProcessor([1], 3),
        host.WatermarkLogitsProcessor(VOCAB, "cpu"),
        host.SynthIDTextWatermarkLogitsProcessor(3, [1, 2], 8, 8, 0, "cpu"),
        host.UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, None),
        PlanLogitsProcessor(GRAMMAR, 1),
        Heated(0.7),
        lambda ids, scores: scores,
    ]


def noisy_scores(rows: int) -> Tensor:
    """Scores ``(rows, VOCAB)``, float64, with the control ids banned."""
    scores = 3 * torch.randn(rows, VOCAB, dtype=torch.float64)
    scores[:, list(TOKENS.noise.banned)] = -torch.inf
    return scores


def test_batched_is_the_hosts_list_row_by_row() -> None:
    # Each processor alone, and all together: each must see what the one before left.
    for processors in (*([p] for p in prefix_free()), prefix_free()):
        ours = split(*processors)
        assert not ours.needs_prefix and not ours.trivial and ours.min_new_tokens == 0
        scores = noisy_scores(9)
        given = scores.clone()
        out = ours.batched(scores)
        for row, after in zip(scores, out, strict=True):
            ids = torch.randint(VOCAB, (1, int(torch.randint(1, 9, ()))))  # whatever is before
            assert torch.equal(LogitsProcessorList(processors)(ids, row[None])[0], after)
            assert torch.equal(ours.in_order(ids, row[None])[0], after)
        assert torch.equal(scores, given)
        assert bool((out[:, list(TOKENS.noise.banned)] == -torch.inf).all())
        assert not torch.equal(out, scores)


def test_the_hosts_order_is_kept() -> None:
    first = [host.TopPLogitsWarper(0.6), host.TemperatureLogitsWarper(3.0)]
    scores = noisy_scores(5)
    outs = [split(*processors).batched(scores) for processors in (first, first[::-1])]
    assert not torch.equal(*outs)
    assert torch.equal(outs[0], first[1](None, first[0](None, scores)))


def test_bans_survive_processors_that_lift_them() -> None:
    lifting = [host.InfNanRemoveLogitsProcessor(), host.TopKLogitsWarper(4, filter_value=-99.0)]
    scores = noisy_scores(3)
    scores[:, 5] = torch.nan
    expected = LogitsProcessorList(lifting)(None, scores)
    assert torch.isfinite(expected).all()
    expected[:, list(TOKENS.noise.banned)] = -torch.inf
    assert torch.equal(split(*lifting).batched(scores), expected)
    # A forced token was let in on purpose.
    ours = split(host.ForcedEOSTokenLogitsProcessor(5, 47), *lifting, verified=True)
    out = ours.in_order(torch.ones(1, 4, dtype=torch.long), scores[:1])
    assert out.argmax() == 47 and out[0, 47] == 0.0


def test_every_class_of_the_host_is_classified() -> None:
    without = {type(p) for p in prefix_free()} | {host.InfNanRemoveLogitsProcessor}
    length_only = {host.MinLengthLogitsProcessor, host.MinNewTokensLengthLogitsProcessor}
    for processor in (*prefix_free(), host.InfNanRemoveLogitsProcessor()):
        assert not split(processor, verified=True).needs_prefix
    for processor in with_prefix():
        assert split(processor, verified=True).needs_prefix
    seen = {type(processor) for processor in with_prefix()}
    classes = [c for c in vars(host).values() if isinstance(c, type) and issubclass(c, LogitsProcessor)]
    assert len(classes) > 30
    for kind in classes:  # also those that need a speech model to be built: their class alone must decide
        if kind not in without | length_only | seen:
            assert split(kind.__new__(kind), verified=True).needs_prefix, kind


@pytest.mark.parametrize("processor", with_prefix(), ids=lambda p: type(p).__name__)
def test_unverified_diffusion_refuses_what_reads_a_prefix(processor: Any) -> None:
    name = type(processor).__name__ if isinstance(processor, LogitsProcessor) else "<lambda>"
    with pytest.raises(ProcessorError, match=r"verify_spans=True.*strategy='autoregressive'.*drop") as error:
        split(host.TopKLogitsWarper(5), processor)
    assert str(error.value).startswith(f"{name}:")


def test_lengths_are_left_to_the_strategy() -> None:
    new = host.MinNewTokensLengthLogitsProcessor(4, 3, 45)
    whole = host.MinLengthLogitsProcessor(9, 45)
    for processors, expected in (([new], 3), ([whole], 5), ([whole, new], 5), ([], 0)):
        ours = split(*processors)
        assert ours.min_new_tokens == expected
        assert not ours.needs_prefix and ours.trivial == (expected == 0)
        scores = noisy_scores(1)
        assert torch.equal(ours.in_order(torch.ones(1, 5, dtype=torch.long), scores), scores)
        for length in range(4, 12):  # the host's own answer to the same question
            out = LogitsProcessorList(processors)(torch.ones(1, length, dtype=torch.long), scores)
            assert (out[0, 45] == -torch.inf).item() == (length - 4 < ours.min_new_tokens)
    assert split(whole, prompt_length=20).trivial and Processors(None, verified=False, prompt_length=4).trivial


def hosts_list(**arguments: Any) -> LogitsProcessorList:
    """What the host hands to a decoding loop for the left-padded prompts."""
    caught: list[LogitsProcessorList] = []

    def loop(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **kwargs: Any) -> Tensor:
        caught.append(logits_processor)
        return input_ids

    tiny("llama").generate(
        PROMPT, attention_mask=MASK, max_new_tokens=6, eos_token_id=45, pad_token_id=PAD,
        custom_generate=loop, **arguments,
    )  # fmt: skip
    return caught[0]


def test_in_order_is_the_hosts_batch() -> None:
    def constraint(row: int, ids: Tensor) -> list[int]:
        return [token for token in range(VOCAB) if token % 3 != row]

    def last_token(ids: Tensor, scores: Tensor) -> Tensor:
        return scores - torch.nn.functional.one_hot(ids[:, -1], VOCAB)

    arguments: dict[str, Any] = {
        "repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.4,
        "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[3], [7, 8]], "prefix_allowed_tokens_fn": constraint,
        "suppress_tokens": [11], "begin_suppress_tokens": [12], "forced_eos_token_id": 45, "do_sample": True,
        "top_k": 20, "temperature": 0.8, "exponential_decay_length_penalty": (2, 1.5), "min_new_tokens": 2,
        "logits_processor": LogitsProcessorList([last_token]),
    }  # fmt: skip
    whole, processors = hosts_list(**arguments), hosts_list(**arguments)
    assert len(processors) >= 12
    ours = split(*processors, verified=True, prompt_length=PROMPT.shape[1])
    assert ours.needs_prefix and ours.min_new_tokens == 2
    ids = PROMPT  # (3, length)
    differing = 0
    for step in range(6):
        scores = noisy_scores(3)
        if step < ours.min_new_tokens:
            scores[:, 45] = -torch.inf  # the strategy's part
        expected = whole(ids, scores.clone())  # some processors of 5.15 write into their scores
        for row in range(3):
            own = ids[row : row + 1]
            found = ours.in_order(own, scores[row : row + 1].clone(), row)[0]
            # NaN: the length penalty of 5.15 makes it of a banned end token.
            torch.testing.assert_close(found, expected[row], rtol=0, atol=0, equal_nan=True)
            differing += not torch.equal(ours.in_order(own, scores[row : row + 1].clone(), 0)[0], expected[row])
        ids = torch.cat([ids, expected.argmax(-1, keepdim=True)], dim=1)
    assert differing > 0  # the rows of this batch are not interchangeable
    assert bool((ids[:, -1] == 45).all())


def test_what_a_processor_remembers_stays_in_its_lane() -> None:
    model = tiny("llama")
    prompts = torch.tensor([[5, 6], [7, 8], [9, 3]])  # (3, 2)

    def make(prompt: Tensor) -> LogitsProcessorList:
        guidance = host.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model, prompt)
        return LogitsProcessorList([guidance, host.SynthIDTextWatermarkLogitsProcessor(3, [1, 2, 3], 64, 8, 0, "cpu")])

    ours = split(*make(prompts), verified=True, prompt_length=2)
    lanes = [(row, lane) for row in range(3) for lane in range(2)]
    alone = {key: make(prompts[key[0] : key[0] + 1]) for key in lanes}
    ids = {(row, lane): torch.tensor([[10 + row, 20 + lane]]) for row, lane in lanes}
    with torch.no_grad():
        for _ in range(4):
            for key in lanes:
                scores = torch.randn(1, VOCAB, dtype=torch.float64)
                expected = alone[key](ids[key], scores)
                assert torch.equal(ours.in_order(ids[key], scores, *key), expected)
                ids[key] = torch.cat([ids[key], expected.argmax(-1, keepdim=True)], dim=1)


def test_several_answers_of_one_prompt_share_it() -> None:
    arguments = {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.4, "do_sample": True, "top_k": 0}
    processors = hosts_list(**arguments, num_return_sequences=2)
    ours = Processors(processors, verified=True, prompt_length=PROMPT.shape[1], rows_per_prompt=2)
    ids = torch.cat([PROMPT, torch.tensor([[6], [3], [8]])], dim=1)  # (3, 9)
    scores = noisy_scores(3)
    expected = hosts_list(**arguments)(ids, scores)
    for row in range(6):
        own = slice(row // 2, row // 2 + 1)
        assert torch.equal(ours.in_order(ids[own], scores[own], row), expected[own])


class Wrapping(LogitsProcessor):
    """Passes on what it does not have, so that copying it recurses without end."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.inner(input_ids, scores)


def test_a_processor_that_cannot_be_copied_is_refused_for_several_texts_and_serves_one() -> None:
    made = LogitsProcessorList([Wrapping(lambda ids, scores: scores + 1)])
    one = Processors(made, verified=True, prompt_length=1, one_text=True)
    assert torch.equal(one.in_order(PROMPT[:1], torch.zeros(1, VOCAB)), torch.ones(1, VOCAB))
    for several in ({"batch_size": 2, "one_text": True}, {"one_text": False}):
        with pytest.raises(DecodingError, match=r"cannot be copied.*one prompt at a time"):
            Processors(made, verified=True, prompt_length=1, **several)
