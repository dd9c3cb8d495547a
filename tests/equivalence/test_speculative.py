"""Theorem 4: whoever drafts, the text is the one of plain decoding.

Bugs these tests catch: a draft that is accepted behind its first wrong token; keys of a rejected draft that are still
seen; sequences of a batch that accept alike; a draft that runs over the end, over ``max_new_tokens`` or over the
positions of the model; processors that see drafted tokens, or are called twice for one; noise that depends on the
draft; measured times that change the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_hybrid import DiffusionDrafter, Draft, Drafter, ModelDrafter, SuffixDrafter, SuffixMemory, Text, generate_many
from hf_hybrid.decoding.verify import check_lane
from tests.models_for_tests import (
    CONTROL,
    MAX_POSITIONS,
    MODELS,
    PROMPTS,
    TEXT,
    VOCAB,
    hybrid,
    left_padded,
    tiny,
    watching,
    words,
    writer,
)


class Oracle(Drafter):
    """Knows the answers, and is wrong wherever ``wrong`` says so."""

    name = "oracle"

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float = 0.0, longest: int = 100):
        self.answers, self.wrong, self.longest, self.draws = answers, wrong, longest, random.Random(0)

    def propose(self, texts: Sequence[Text], length: int, sampler: Any) -> list[Draft]:
        return [self.draft(text, self.draws.randint(0, min(length, self.longest))) for text in texts]

    def draft(self, text: Text, length: int) -> Draft:
        answer = self.answers[tuple(text.tokens[: text.prompt_length])]
        done = len(text.tokens) - text.prompt_length
        tokens = answer[done : done + length]
        tokens += [self.draws.randrange(VOCAB) for _ in range(length - len(tokens))]  # beyond the end, too
        return Draft([self.draws.randrange(VOCAB) if self.draws.random() < self.wrong else t for t in tokens])


@cache
def model(name: str = "llama") -> Any:
    """Writes long and varied texts; an end is chosen so that the sequences of the batch finish at different times."""
    host = hybrid(name, seed=26)
    row = host.generate(**left_padded(), max_new_tokens=30, strategy="autoregressive")[0, 8:].tolist()
    host.generation_config.eos_token_id = [CONTROL.noise.end, max(set(row), key=row.index)]
    return host


BASE: dict[str, Any] = {**left_padded(), "max_new_tokens": 30}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "seed": 11}


def plain(name: str = "llama", **arguments: Any) -> torch.Tensor:
    return model(name).generate(**{**BASE, **arguments}, strategy="autoregressive")


def speculative(drafter: Any, name: str = "llama", **arguments: Any) -> Any:
    options = {"strategy": "speculative", "adaptive": False, "return_dict_in_generate": True}
    return model(name).generate(**{**BASE, **options, **arguments}, drafter=drafter)


def test_the_rows_finish_at_different_times() -> None:
    lengths = [len([token for token in row if token]) for row in plain()[:, 8:].tolist()]
    assert len({*lengths}) >= 2 and max(lengths) > 12


def answers_of(ids: torch.Tensor, prompts: Any = PROMPTS) -> dict[tuple[int, ...], list[int]]:
    width = max(map(len, prompts))
    return {p: row[width:] for p, row in zip(prompts, ids.tolist(), strict=True)}


def drafters(ids: torch.Tensor) -> dict[str, Any]:
    """Drafters of every kind for prompts whose answers are ``ids``."""
    memory = SuffixMemory()
    for row in ids.tolist():
        memory.add([token for token in row if token])
    answers = answers_of(ids)
    return {
        "suffix": "suffix",
        "memory": SuffixDrafter(memory),
        "right": Oracle(answers),
        "often right": Oracle(answers, wrong=0.3),
        "wrong": Oracle(answers, wrong=1.0),
        "self": "self",
        "model": ModelDrafter(smaller(), least_chance=0.0),
        "same model": ModelDrafter(model(), least_chance=0.0),
        "diffusion": DiffusionDrafter(model(), window=4, least_chance=0.0),
    }


@cache
def smaller() -> Any:
    """One layer, and a vocabulary that is padded otherwise."""
    host = tiny("llama", seed=9, num_hidden_layers=1, vocab_size=VOCAB + 3)
    source, weight = model().get_output_embeddings(), host.get_output_embeddings().weight
    with torch.no_grad():  # the head of the larger one, so that some drafts are right
        weight[:VOCAB] = source.weight
        host.get_input_embeddings().weight[:VOCAB] = model().get_input_embeddings().weight
    host.get_output_embeddings().bias = torch.nn.Parameter(torch.cat([source.bias.detach(), torch.zeros(3)]).double())
    host.generation_config.eos_token_id = model().generation_config.eos_token_id
    return host


KINDS = ("suffix", "memory", "right", "often right", "wrong", "self", "model", "same model", "diffusion")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "min_new_tokens": {"min_new_tokens": 12},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[22], [34, 34], [17, 18], [CONTROL.noise.end]]},
    "sampled": SAMPLED,
    "sampled with penalty": {**SAMPLED, "repetition_penalty": 1.4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_the_text_of_plain_decoding(kind: str, case: str) -> None:
    """Greedy and sampled, batches of unequal prompts, in float64."""
    expected = plain(**CASES[case])
    found = speculative(drafters(expected)[kind], **CASES[case])
    assert torch.equal(found.sequences, expected)
    tokens = sum(report.num_tokens for report in found.report)
    accepted = sum(sum(report.accepted_per_round) for report in found.report)
    if kind in ("right", "same model"):
        assert 3 * accepted > tokens, "drafts are accepted"
    if kind == "wrong":
        assert sum(report.drafting.rounds for report in found.report) > tokens // 3 and 10 * accepted < tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["memory", "often right", "self"])
def test_every_model_class(name: str, kind: str) -> None:
    expected = plain(name)
    assert torch.equal(speculative(drafters(expected)[kind], name).sequences, expected)


@pytest.mark.parametrize("length", [1, 2, 7, 24])
def test_any_length_adaptive_or_not(length: int) -> None:
    expected = plain()
    for adaptive in (False, True):
        drafter = Oracle(answers_of(expected), wrong=0.2)
        found = speculative(drafter, draft_length=length, adaptive=adaptive)
        assert torch.equal(found.sequences, expected)
        assert all(accepted <= length for report in found.report for accepted in report.accepted_per_round)


@pytest.mark.parametrize("case", ["plain", "sampled", "sampled with penalty"])
def test_a_row_equals_its_own_batch_of_one(case: str) -> None:
    arguments = {**CASES[case], "seed": [3, 5, 7, 1000]} if case != "plain" else {}
    answers = answers_of(plain(**arguments))
    together = speculative(Oracle(answers, wrong=0.3), **arguments).sequences
    for row, prompt in enumerate(PROMPTS):
        own = {**arguments, **left_padded((prompt,))} | ({"seed": arguments["seed"][row]} if arguments else {})
        alone = speculative(Oracle(answers, wrong=0.3), **own).sequences[0, len(prompt) :].tolist()
        batch = together[row, BASE["input_ids"].shape[1] :].tolist()
        assert batch[: len(alone)] == alone and set(batch[len(alone) :]) <= {0}


@pytest.mark.parametrize("kind", ["model", "diffusion", "self"])
def test_with_rejection_too_a_sequence_equals_its_own_batch_of_one(kind: str) -> None:
    """What a drafter says of its probabilities decides the text, so that it must not depend on other sequences."""
    options = {**SAMPLED, "acceptance": "rejection", "draft_length": 5, "max_new_tokens": 20, "draft_threshold": 0.0}
    seeds = [3, 5, 7, 1000]
    together = speculative(drafters(plain())[kind], **{**options, "seed": seeds}).sequences
    for row, prompt in enumerate(PROMPTS):
        own = {**options, **left_padded((prompt,)), "seed": seeds[row]}
        alone = speculative(drafters(plain())[kind], **own).sequences[0, len(prompt) :].tolist()
        batch = together[row, BASE["input_ids"].shape[1] :].tolist()
        assert batch[: len(alone)] == alone and set(batch[len(alone) :]) <= {0}


def test_a_draft_stops_at_max_new_tokens_and_at_the_positions_of_the_model() -> None:
    for budget in (1, 2, 3, 17):
        expected = plain(max_new_tokens=budget)
        found = speculative(Oracle(answers_of(plain())), max_new_tokens=budget)
        assert torch.equal(found.sequences, expected)
    prompt = torch.tensor([[3, 7, 9] * 40])  # 120 of 128 positions
    host = hybrid("gpt2", seed=4, favours={CONTROL.noise.end: -99.0})
    expected = host.generate(prompt, strategy="autoregressive", max_new_tokens=50)
    answer = expected[0, 120:].tolist()
    drafter = Oracle({tuple(prompt[0].tolist()): answer})
    found = host.generate(prompt, strategy="speculative", drafter=drafter, adaptive=False, max_new_tokens=50)
    assert torch.equal(found, expected) and found.shape[1] == MAX_POSITIONS


def test_ends_and_stop_strings_inside_an_accepted_draft() -> None:
    prompt = (PROMPTS[0],)
    ids = plain(**left_padded(prompt))
    answer = answers_of(ids, prompt)[prompt[0]]
    beyond = Oracle({prompt[0]: [*answer, 5, 5, 5]})  # goes on behind the end
    assert torch.equal(speculative(beyond, **left_padded(prompt)).sequences, ids)
    host, options = writer(False), {**SAMPLED, "max_new_tokens": 30}
    answer = host.generate(torch.tensor(prompt), strategy="autoregressive", **options)[0, len(prompt[0]) :].tolist()
    inner = [token for token in dict.fromkeys(answer) if token in TEXT]
    assert len(inner) > 3
    for token in inner[1:4]:
        stop = {"stop_strings": f"w{token:02}", "tokenizer": words(), "drafter": Oracle({prompt[0]: answer})}
        found = host.generate(torch.tensor(prompt), strategy="speculative", adaptive=False, **options, **stop)
        assert found[0, len(prompt[0]) :].tolist() == answer[: answer.index(token) + 1]


class Counting(LogitsProcessor):
    """Notes the prefix of every call."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return scores


def test_a_processor_sees_every_true_prefix_once_and_in_order() -> None:
    prompt = (PROMPTS[2],)
    expected = plain(**left_padded(prompt))
    counting = Counting()
    drafter = Oracle(answers_of(expected, prompt), wrong=0.3)
    found = speculative(drafter, **left_padded(prompt), logits_processor=LogitsProcessorList([counting]))
    text = found.sequences[0].tolist()
    assert torch.equal(found.sequences, expected)
    assert counting.seen == [text[:count] for count in range(len(prompt[0]), len(text))]


class Matching(LogitsProcessor):
    """Like the processors of grammar libraries: a matcher per sequence, made at the first call and advanced by the last
    token of every further one. Bans what would make a token follow one of the same remainder by three."""

    def __init__(self, grown: bool):
        self.grown, self.matchers = grown, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.matchers:
            made = [ids.tolist() for ids in input_ids]
            if self.grown:
                self.matchers.extend(made)
            else:
                self.matchers = made
        else:
            for matcher, ids in zip(self.matchers, input_ids, strict=True):
                matcher.append(int(ids[-1]))
        for matcher, ids, row in zip(self.matchers, input_ids, scores, strict=True):
            assert matcher == ids.tolist()
            row[matcher[-1] % 3 :: 3] = -torch.inf
        return scores


@pytest.mark.parametrize("grown", [False, True], ids=["assigned", "grown"])
def test_a_grammar_with_a_state_per_row_serves_every_row(grown: bool) -> None:
    host = hybrid(seed=26)
    del host.config.hf_hybrid  # so that the host may write tags as well
    base = {**BASE, "do_sample": False, "eos_token_id": CONTROL.noise.end, "pad_token_id": 0}
    expected = host.generate(**base, logits_processor=LogitsProcessorList([Matching(grown)]))
    for drafter in ("suffix", Oracle(answers_of(expected), wrong=0.3)):
        options = {"strategy": "speculative", "adaptive": False, "drafter": drafter}
        found = host.generate(**base, **options, logits_processor=LogitsProcessorList([Matching(grown)]))
        assert torch.equal(found, expected)


def test_rejection_reads_nothing_behind_an_end() -> None:
    """A drafter that is never wrong drafts on behind the end of the answer."""
    prompt, drafter = PROMPTS[2], ModelDrafter(model(), least_chance=0.0)
    options = {**SAMPLED, **left_padded((prompt,)), "acceptance": "rejection", "draft_length": 5}
    inside = 0
    for seed in range(12):
        for processors in ([], [Counting()]):
            found = speculative(drafter, logits_processor=LogitsProcessorList(processors), **options | {"seed": seed})
            (report,), text = found.report, found.sequences[0].tolist()
            assert sum(written for _, _, written in report.drafting.passes) == report.num_tokens
            assert report.drafting.acceptance == [1.0] * len(report.drafting.tried)
            inside += report.drafting.passes[-1][2] < 6 and report.num_tokens < 30
            for counting in processors:
                assert counting.seen == [text[:count] for count in range(len(prompt), len(text))]
    assert inside > 0, "an end inside a draft"


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_processors_of_a_half_precision_model_see_float32(sampled: bool) -> None:
    """As in the host: a penalty or a temperature in bfloat16 would make ties."""
    host, kinds = hybrid(seed=26).to(torch.bfloat16), set[torch.dtype]()

    def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kinds.add(scores.dtype)
        return scores

    options = {**BASE, **(SAMPLED if sampled else {"do_sample": False}), "repetition_penalty": 1.3}
    for strategy in ({"strategy": "autoregressive"}, {"strategy": "speculative", "drafter": ModelDrafter(host)}):
        host.generate(**options, **strategy, logits_processor=LogitsProcessorList([note]))
    assert kinds == {torch.float32}


def test_a_chain_is_accepted_up_to_its_first_mismatch() -> None:
    draws = random.Random(0)
    for _ in range(300):
        draft = [draws.randrange(2) for _ in range(draws.randrange(6))]
        checked = [draws.randrange(2) for _ in range(len(draft) + 1)]
        accepted = 0
        while accepted < len(draft) and draft[accepted] == checked[accepted]:
            accepted += 1
        assert check_lane(draft, checked) == (checked[: accepted + 1], accepted)
        # A check that ended at the mismatch says the same.
        assert check_lane(draft, checked[: accepted + 1]) == (checked[: accepted + 1], accepted)
    assert check_lane([], []) == check_lane([3], []) == ([], 0)


def test_many_prompts() -> None:
    prompts = [*PROMPTS, *PROMPTS[::-1], (9, 9, 9)]
    options = {"max_new_tokens": 30, "batch_size": 3, "do_sample": False}
    expected = {a.index: a.tokens for a in generate_many(model(), prompts, strategy="autoregressive", **options)}
    drafter = SuffixDrafter(SuffixMemory())
    found = {
        a.index: a.tokens
        for a in generate_many(model(), prompts, strategy="speculative", drafter=drafter, adaptive=False, **options)
    }
    whole = {(*prompt, *expected[index]) for index, prompt in enumerate(prompts)}
    assert found == expected and drafter.memory is not None
    assert {tuple(text) for text in drafter.memory.texts} == whole


@pytest.mark.parametrize("batch_size", [1, 3], ids=["alone", "three"])  # alone: every text is the last one of its batch
@pytest.mark.parametrize("kind", ["self", "model", "diffusion"])
def test_many_prompts_with_drafters_that_keep_a_cache(kind: str, batch_size: int) -> None:
    prompts = [*PROMPTS, *PROMPTS[::-1], (9, 9, 9)]
    options = {"max_new_tokens": 20, "batch_size": batch_size, "do_sample": False}
    expected = {a.index: a.tokens for a in generate_many(model(), prompts, strategy="autoregressive", **options)}
    drafter = drafters(plain())[kind]
    answers = generate_many(model(), prompts, strategy="speculative", drafter=drafter, adaptive=False, **options)
    assert {a.index: a.tokens for a in answers} == expected


def test_the_same_model_drafts_what_it_would_write() -> None:
    """Sampled: with the noise of the check a right drafter is never wrong."""
    for arguments in ({}, SAMPLED):
        expected = plain(**arguments)
        found = speculative(ModelDrafter(model(), least_chance=0.0), draft_length=5, **arguments)
        assert torch.equal(found.sequences, expected)
        for report in found.report:
            whole = report.accepted_per_round[:-1]  # the last round may end with the text
            assert whole == [5] * len(whole)


def test_a_diffusion_model_drafts_a_block_in_one_pass() -> None:
    """Its first token is that of its clean row: from the model itself, always right."""
    expected, drafter = plain(), DiffusionDrafter(model(), window=4, least_chance=0.0)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model().model.register_forward_pre_hook(watching(count))
    try:
        found = speculative(drafter)
    finally:
        hook.remove()
    assert torch.equal(found.sequences, expected)
    for report in found.report:
        assert all(accepted >= 1 for accepted in report.accepted_per_round[:-1])
        assert report.drafting.rounds > 0
    assert passes <= 2 * max(report.num_forwards for report in found.report)


def test_the_report_counts() -> None:
    expected = plain()
    found = speculative(Oracle(answers_of(expected), wrong=0.3, longest=5))
    for row, report in enumerate(found.report):
        drafting = report.drafting
        assert drafting.drafter == "oracle" and drafting.off == drafting.probes == 0
        assert drafting.rounds == len(report.accepted_per_round)
        assert drafting.rounds + drafting.empty == report.num_forwards
        assert sum(drafting.accepted) == sum(report.accepted_per_round)
        assert drafting.tried[0] == drafting.rounds and len(drafting.tried) <= 5
        # Nothing is tried behind a rejected token, and a tried depth needs the one before it to be accepted.
        assert all(tried <= accepted for tried, accepted in zip(drafting.tried[1:], drafting.accepted, strict=False))
        assert all(0 <= share <= 1 for share in drafting.acceptance)
        length = len([t for t in expected[row, 8:].tolist() if t])
        assert report.num_tokens == length
        assert set(report.seconds) >= {"prefill", "draft", "total"}
    assert any("verify" in report.seconds for report in found.report)
