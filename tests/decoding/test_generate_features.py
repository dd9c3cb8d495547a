"""What a call of ``generate`` may ask for besides a strategy, and what it gets back.

Bugs these tests catch: an answer longer than ``max_new_tokens``; control tokens or plan labels that leak into the text;
a report that miscounts; stop strings that act in the order of time instead of text; a cache that a host call continues
at the wrong position; a caller's cache that is ignored or read wrongly; extension or fallback that cannot be switched
off; a dense round that never ends; a head of another class, as quantised ones are, that is read instead of called.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_hybrid import Plan, Span
from hf_hybrid.core.grammars import grammar_of
from hf_hybrid.decoding import HybridGenerateOutput
from hf_hybrid.models.host import CACHE
from tests.models_for_tests import CONTROL, VOCAB, hybrid, left_padded, watching, words, writer

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
PLAN = Plan((Span((5,), 3), Span((6, 8), 4), Span((5,), 2, (0,))))
PLANNED: dict[str, Any] = {"strategy": "planned_diffusion"}
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "prefix": {"strategy": "block_diffusion", "confidence_threshold": 0.3},
    "block": {"strategy": "block_diffusion", "confidence_threshold": 0.3, "commit": "block"},
    "verified": {**PLANNED, "draft_threshold": 0.0, "plan_window": 4},
    "span by span": {**PLANNED, "span_decoding": "autoregressive"},
    "unverified": {**PLANNED, "verify_spans": False, "confidence_threshold": 0.3},
    "dense": {**PLANNED, "visibility": "dense", "max_denoising_steps": 3},
}


LONG = Plan((Span((5,), 8), Span((6,), 8), Span((9,), 8)))


@cache
def endless() -> Any:
    """A model whose parts fill every length."""
    return hybrid(seed=13, favours={CONTROL.noise.filler: -99.0, CONTROL.noise.end: 3.0})


def model(settings: dict[str, Any]) -> Any:
    return writer(settings["strategy"] == "planned_diffusion")


def generate(host: Any = None, ids: Tensor = PROMPT, **settings: Any) -> Any:
    arguments = {"max_new_tokens": 60, "return_dict_in_generate": True, **settings}
    return (host or model(settings)).generate(ids, **arguments)


def new_ids(output: Any) -> list[int]:
    return output.sequences[0, PROMPT.shape[1] :].tolist()


def text_of(ids: list[int]) -> list[int]:
    """The text in new tokens with control tokens: plans (labels, lengths, dependencies) and tags left out."""
    text: list[int] = []
    planning = False
    for token in ids:
        planning = token == CONTROL.tags.topic or (planning and token != CONTROL.tags.async_)
        if not planning and token not in CONTROL.noise.banned:
            text.append(token)
    return text


@pytest.mark.parametrize("mode", MODES)
def test_max_new_tokens_bounds_every_mode(mode: str) -> None:
    lengths = []
    for new in (1, 2, 7, 8, 9, 10, 11, 13, 21, 34, 60):
        output = generate(max_new_tokens=new, return_control_tokens=True, **MODES[mode])
        assert 1 <= len(new_ids(output)) <= new
        assert CONTROL.noise.mask not in new_ids(output)
        lengths.append(len(new_ids(output)))
    assert lengths[-1] > 20


@pytest.mark.parametrize("mode", MODES)
def test_the_report_counts_what_happened(mode: str) -> None:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model(MODES[mode]).model.register_forward_hook(watching(count))
    output = generate(**MODES[mode])
    hook.remove()
    report = output.report[0]
    assert isinstance(output, HybridGenerateOutput)
    assert report.num_forwards == passes
    assert report.num_tokens == len(new_ids(output))
    assert report.tokens_per_forward == report.num_tokens / passes
    assert report.num_rows >= PROMPT.shape[1] + report.num_forwards - 1
    assert report.strategy == MODES[mode]["strategy"]
    assert 0 <= report.seconds_to_first_text <= report.seconds["total"]
    stages = sum(seconds for stage, seconds in report.seconds.items() if stage != "total")
    assert 0 < stages <= report.seconds["total"]


@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode]["strategy"] == "planned_diffusion"])
def test_control_tokens_parse_back_and_text_leaves_them_out(mode: str) -> None:
    settings = {"max_parts": 3, "max_new_tokens": 120, **MODES[mode]}
    full, plain = generate(return_control_tokens=True, **settings), generate(**settings)
    ids, report = new_ids(full), full.report[0]
    text = text_of(ids)
    assert new_ids(plain)[: len(text)] == text and len(text) > 12, "the first is cut earlier: its tags count"
    assert not set(CONTROL.noise.banned) & set(new_ids(plain))
    assert ids[0] == CONTROL.tags.par and len(report.plans) >= 1
    grammar, at, spans = grammar_of(CONTROL, VOCAB), 1, iter(report.spans)
    for number, plan in enumerate(report.plans, 1):
        state, count = grammar.parse(ids[at:])
        assert state.stage == "written" and state.plan.spans == plan.spans
        at += count - 1  # the first <async> opens a part
        for part, span in enumerate(plan.spans):
            found = next(spans, None)
            assert found is not None and (found.round, found.part, found.label) == (number, part, span.label)
            whole = [*grammar.opening(span), *found.tokens]
            whole = whole[: len(ids) - at]  # where the answer is cut
            assert ids[at : at + len(whole)] == whole
            assert found.extended == (len(found.tokens) > found.planned == span.length)
            at += len(whole)
        assert at == len(ids) or ids[at] == CONTROL.tags.sync
        at += 1
    assert next(spans, None) is None


def test_without_return_dict_ids_come_back() -> None:
    ids = generate(return_dict_in_generate=False, **MODES["verified"])
    assert isinstance(ids, Tensor) and torch.equal(ids, generate(**MODES["verified"]).sequences)
    assert torch.equal(ids[:, : PROMPT.shape[1]], PROMPT)


def test_extension_and_its_limit() -> None:
    for factor, longest in ((1.0, [3, 4, 2]), (1.5, [5, 6, 3]), (3.0, [9, 12, 6])):
        for mode in ("verified", "unverified", "span by span"):
            report = generate(endless(), plan=PLAN, max_span_extension=factor, **MODES[mode]).report[0]
            assert [len(span.tokens) for span in report.spans] == longest, mode
            assert [span.extended for span in report.spans] == [factor > 1.0] * 3
            assert sum("was extended" in line for line in report.fallbacks) == (3 if factor > 1.0 else 0)


def test_a_part_without_confidence_goes_on_token_by_token() -> None:
    unsure = {**PLANNED, "plan": LONG, "verify_spans": False, "confidence_threshold": 1.0}
    report = generate(endless(), span_fallback_confidence=1.0, **unsure).report[0]
    lines = [line for line in report.fallbacks if "token by token" in line]
    assert len(lines) == 3 and all("two passes" in line for line in lines)
    never = generate(endless(), span_fallback_confidence=None, **unsure).report[0]
    assert not any("token by token" in line for line in never.fallbacks)
    assert report.num_rows < never.num_rows
    alone = generate(endless(), plan=LONG, **MODES["span by span"]).report[0]
    assert [span.tokens for span in report.spans] == [span.tokens for span in alone.spans]


def test_a_part_waits_for_what_it_depends_on() -> None:
    chain = Plan(tuple(Span(span.label, 4, tuple(range(i))) for i, span in enumerate(LONG.spans)))
    free = Plan(tuple(Span(span.label, 4) for span in LONG.spans))
    # Three times a label and four tokens of text.
    settings = {**MODES["span by span"], "max_span_extension": 1.0, "max_new_tokens": 3 * (1 + 4)}
    waiting = generate(endless(), plan=chain, **settings).report[0]
    together = generate(endless(), plan=free, **settings).report[0]
    assert (waiting.num_forwards, together.num_forwards) == (3 * 4, 4)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_dense_round_takes_at_most_its_steps(steps: int) -> None:
    settings = {**PLANNED, "visibility": "dense", "confidence_threshold": 1.0, "max_denoising_steps": steps}
    report = generate(plan=[PLAN, PLAN], **settings).report[0]
    assert report.plans == [PLAN, PLAN] and len(report.spans) == 6
    assert all(span.passes <= steps and len(span.tokens) <= span.planned for span in report.spans)
    assert not any(CONTROL.noise.filler in span.tokens or CONTROL.tags.async_ in span.tokens for span in report.spans)


@pytest.mark.parametrize("mode", MODES)
def test_stop_strings_act_in_text_order(mode: str) -> None:
    plan = {"plan": PLAN} if MODES[mode]["strategy"] == "planned_diffusion" else {}
    text = new_ids(generate(**MODES[mode], **plan))
    assert len(text) > 8
    for token in {text[0], text[4], text[-2]} - {CONTROL.noise.end}:
        arguments = {**MODES[mode], **plan, "stop_strings": f"w{token:02}", "tokenizer": words()}
        stopped = generate(**arguments)
        assert new_ids(stopped) == text[: text.index(token) + 1]
        assert stopped.report[0].num_tokens == len(new_ids(stopped))


@pytest.mark.parametrize("mode", MODES)
def test_a_host_call_goes_on_from_the_returned_cache(mode: str) -> None:
    output = generate(return_past_key_values=True, max_new_tokens=30, **MODES[mode])
    ids = torch.cat([output.sequences, torch.tensor([[8, 4]])], dim=1)  # another turn of a chat
    assert output[CACHE].get_seq_length() == output.sequences.shape[1] - 1
    host = model(MODES[mode])
    expected = host.generate(ids, max_new_tokens=12)
    assert torch.equal(host.generate(ids, max_new_tokens=12, **{CACHE: output[CACHE]}), expected)
    # Strategies that write one causal text have the cache at hand; of others it must be asked for.
    assert (getattr(generate(max_new_tokens=30, **MODES[mode]), CACHE) is None) == (mode != "autoregressive")


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_of_a_prefix_changes_nothing(mode: str) -> None:
    batch = left_padded()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for held in (1, 5, 7):
        held_cache = DynamicCache()
        positions = (mask[:, :held].cumsum(dim=1) - 1).clamp(min=0)
        arguments = {"input_ids": ids[:, :held], "attention_mask": mask[:, :held], "position_ids": positions}
        model(MODES[mode])(**arguments, use_cache=True, **{CACHE: held_cache})
        settings = {"max_new_tokens": 20, "attention_mask": mask, **MODES[mode]}
        expected = generate(ids=ids, **settings)
        found = generate(ids=ids, past_key_values=held_cache, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.report[0].num_rows < expected.report[0].num_rows or held == 1


class Packed(torch.nn.Module):
    """A head as quantised layers are: ``weight`` is no tensor."""

    def __init__(self, head: torch.nn.Linear):
        super().__init__()
        self.out_features, self.linear = head.out_features, head

    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, rows: Tensor) -> Tensor:
        return self.linear(rows)


@pytest.mark.parametrize("mode", [*MODES, "speculative", "drafting model"])
def test_a_head_whose_weight_is_no_tensor(mode: str) -> None:
    settings = MODES.get(mode, {"strategy": "speculative"})
    packed = copy.deepcopy(model(settings))
    packed.lm_head = Packed(packed.lm_head)
    drafter = {"drafter": packed} if mode == "drafting model" else {}
    assert new_ids(generate(packed, **settings, **drafter)) == new_ids(generate(**settings))
