"""Where planned answers end: ``max_new_tokens``, stop strings, the positions of the model, a prefilled turn.

Bugs these tests catch: a plan that is bounded by its rounded lengths, so that parts are missing and the answer looks
whole; a text that depends on how much of it was asked for; an answer that was cut and reported as ended; tags that
count where they are not returned; windows and parts behind the last position of a table; lengths in the report that
count control tokens; a state that breaks in some rare mixture of settings.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from hf_hybrid import Plan, Span
from tests.models_for_tests import CONTROL, FAVOURS, PROMPTS, TEXT, hybrid, left_padded, words, writer

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
PLANNED: dict[str, Any] = {"strategy": "planned_diffusion"}
ENDS: dict[int, float] = {
    CONTROL.noise.end: 7.0,
    CONTROL.tags.topic: 7.0,
    CONTROL.tags.async_: 7.0,
    CONTROL.noise.filler: 4.0,
    **dict.fromkeys((token for _, token in CONTROL.tags.lengths), 6.0),
    **dict.fromkeys(CONTROL.tags.depends, 5.0),
}
"""What a model needs to write a few parts and then end."""
WRITERS = (9, 13, 27)
"""Seeds of models that do, with text between rounds, empty parts and parts that outgrow their plan."""
MODES: dict[str, dict[str, Any]] = {
    "verified": {"draft_threshold": 0.0},
    "planned in windows": {"draft_threshold": 0.0, "plan_window": 4},
    "span by span": {"span_decoding": "autoregressive"},
    "unverified": {"verify_spans": False, "confidence_threshold": 0.3},
    "blocks": {"verify_spans": False, "confidence_threshold": 0.3, "commit": "block", "window_length": 4},
    "dense": {"visibility": "dense", "max_denoising_steps": 3},
}


@cache
def ending(seed: int) -> Any:
    return hybrid(seed=seed, favours=ENDS)


@cache
def table(positions: int = 128) -> Any:
    """A model whose parts fill every length, with so many learned positions; what it has in common with a longer one
    are the weights."""
    long = hybrid("gpt2", seed=26, favours={**FAVOURS, CONTROL.noise.filler: -99.0})
    if positions == 128:
        return long
    short = hybrid("gpt2", seed=26, favours={**FAVOURS, CONTROL.noise.filler: -99.0}, n_positions=positions)
    weights = long.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:positions]
    short.load_state_dict(weights)
    return short


def write(host: Any, new: int = 100, **settings: Any) -> tuple[list[int], Any]:
    """New tokens and report."""
    options = {**PLANNED, "max_new_tokens": new, "return_dict_in_generate": True, **settings}
    output = host.generate(PROMPT, **options)
    return output.sequences[0, PROMPT.shape[1] :].tolist(), output.report[0]


# max_new_tokens.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", WRITERS)
def test_a_shorter_answer_is_the_beginning_of_a_longer_one(seed: int, mode: str) -> None:
    whole, report = write(ending(seed), **MODES[mode])
    ends = report.ended == "eos"
    assert report.spans and ends == (whole[-1] == CONTROL.noise.end) and (ends or len(whole) == 100)
    for new in sorted({1, min(3, len(whole) - 1), len(whole) // 2, len(whole) - 1}):
        text, cut = write(ending(seed), new, **MODES[mode])
        assert text == whole[:new] and cut.num_tokens == new
        assert cut.ended == "length" and any("was cut" in note for note in cut.fallbacks)
        assert [span.tokens for span in report.spans][: len(cut.spans)] >= [span.tokens for span in cut.spans]
    for new in (len(whole), len(whole) + 1) if ends else ():
        text, same = write(ending(seed), new, **MODES[mode])
        assert text == whole and same.ended == "eos"
        assert (same.plans, same.spans) == (report.plans, report.spans)


@pytest.mark.parametrize("mode", MODES)
def test_tags_count_where_they_are_returned(mode: str) -> None:
    settings = {"return_control_tokens": True, **MODES[mode]}
    whole, report = write(ending(13), 300, **settings)
    text, plain = write(ending(13), 300, **MODES[mode])
    assert report.ended == "eos" and report.num_tokens == len(text) < len(whole) and report.spans == plain.spans
    for new in (1, 2, 9, len(whole) // 2, len(whole) - 1):
        ids, cut = write(ending(13), new, **settings)
        assert ids == whole[:new] and cut.ended == "length"
        assert cut.num_tokens == len(text[: cut.num_tokens]) < len(text)
    assert write(ending(13), len(whole), **settings)[1].ended == "eos"


def test_a_given_plan_is_cut_and_never_shortened() -> None:
    plan = Plan((Span((5,), 3), Span((6, 8), 4, text=(1, 2, 3)), Span((5,), 2, (0,))), lead=(7, 7))
    whole, _ = write(writer(True), plan=[plan, plan], max_rounds=2)
    # Two rounds: their leads, labels and given texts alone are 2 * (2 + 4 + 3) tokens.
    for new in range(18, len(whole), 5):
        text, report = write(writer(True), new, plan=[plan, plan], max_rounds=2)
        assert text == whole[:new] and report.ended == "length"


def test_parts_that_cannot_be_in_the_answer_are_not_written() -> None:
    plan = Plan(tuple(Span((5, number), 12) for number in range(1, 9)))
    host = hybrid(seed=26, favours={CONTROL.noise.filler: -99.0})
    rows = [write(host, new, plan=plan)[1].num_rows for new in (16, 60)]
    assert rows[0] < rows[1]


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "autoregressive"}, {"strategy": "block_diffusion"}, {"strategy": "speculative"}, PLANNED],
    ids=lambda settings: settings["strategy"],
)
def test_the_report_says_how_every_strategy_ended(settings: dict[str, Any]) -> None:
    host = ending(13) if settings is PLANNED else hybrid(seed=21, favours={CONTROL.noise.end: 4.5})
    whole, report = write(host, **settings)
    assert report.ended == "eos" and len(whole) > 3
    assert write(host, len(whole) - 1, **settings)[1].ended == "length"
    assert write(host, len(whole), **settings)[1].ended == "eos"
    stop = {"stop_strings": f"w{whole[1]:02}", "tokenizer": words()}
    text, report = write(host, **settings, **stop)
    assert report.ended == "stop" and len(text) <= 2 and report.as_data()["ended"] == "stop"


# What counts is text.


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_the_same_text_with_tags_and_without(mode: str) -> None:
    whole, _ = write(ending(27), **MODES[mode])
    first = {token: whole.index(token) + 1 for token in reversed(whole) if token != CONTROL.noise.end}
    assert len(first) > 1
    for token, length in first.items():
        stop = {"stop_strings": f"w{token:02}", "tokenizer": words(), **MODES[mode]}
        text, report = write(ending(27), **stop)
        ids, tagged = write(ending(27), 400, return_control_tokens=True, **stop)
        assert text == whole[:length] and report.ended == tagged.ended == "stop"
        assert report.num_tokens == tagged.num_tokens == length, "tags are no text"
        assert ids[-1] == token and len(ids) > length
        assert sum(len(span.tokens) for span in tagged.spans) < length, "nothing behind the stop"


def test_min_new_tokens_counts_the_text() -> None:
    whole, _ = write(ending(13))
    longer, report = write(ending(13), min_new_tokens=len(whole) + 5)
    tagged, _ = write(ending(13), 300, min_new_tokens=len(whole) + 5, return_control_tokens=True)
    assert longer[: len(whole) - 1] == whole[:-1] and len(longer) > len(whole) + 5 >= report.num_tokens - 40
    assert [token for token in tagged if token in longer][-3:] == longer[-3:]


# Positions.


@pytest.mark.parametrize("mode", ["verified", "planned in windows", "span by span"])
def test_a_table_of_positions_cuts_what_does_not_fit(mode: str) -> None:
    # A tag of a plan has a position too, and a part begins behind the planned lengths of those before it.
    settings = {"max_label_length": 2, "max_parts": 4, "new": 110, **MODES[mode]}
    whole, _ = write(table(), **settings)
    lengths = []
    for positions in range(24, 120, 8):
        text, report = write(table(positions), **settings)
        assert text == whole[: len(text)] and report.ended == "length"
        assert any("for want of positions" in note or "no plan" in note for note in report.fallbacks)
        lengths.append(len(text))
    assert lengths == sorted(lengths) and lengths[0] > 0 and len(set(lengths)) > 4


@pytest.mark.parametrize("mode", ["unverified", "blocks", "dense"])
def test_windows_end_with_the_table(mode: str) -> None:
    plan, cut = Plan((Span((5,), 12), Span((6, 8), 12), Span((9,), 12, (0,)))), 0
    for positions in range(24, 100, 5):
        for given in (None, plan) if positions > 60 else (None,):  # a plan that cannot fit is refused
            text, report = write(table(positions), 110, plan=given, max_label_length=2, **MODES[mode])
            assert CONTROL.noise.mask not in text and (text or mode == "dense")
            assert report.ended == ("eos" if text[-1:] == [CONTROL.noise.end] else "length")
            cut += report.ended == "length"
    assert cut > 10


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "autoregressive"},
        {"strategy": "speculative", "adaptive": False},
        {"strategy": "speculative", "drafter": "self", "adaptive": False, "draft_threshold": 0.0},
        {"strategy": "block_diffusion", "confidence_threshold": 0.3},
        {"strategy": "block_diffusion", "commit": "block"},
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [8, 7])
def test_other_strategies_fill_the_table(settings: dict[str, Any], window: int) -> None:
    host = hybrid("gpt2", seed=13, favours={CONTROL.noise.end: -9.0}, n_positions=40)
    width = {} if settings["strategy"] == "autoregressive" else {"window_length": window}
    text, report = write(host, 200, **settings, **width)
    assert len(text) == 35 and report.ended == "length"


def test_without_positions_for_a_part_there_is_no_plan() -> None:
    host = table(40)  # a part may need 4 + 2 * 16 + 2 positions
    text, report = write(host)
    plain = host.generate(PROMPT, strategy="planned_diffusion", continue_final_message=True, max_new_tokens=100)
    assert text == plain[0, 5:].tolist() and not report.plans
    assert any("no plan: the model has 35 positions left" in note for note in report.fallbacks)
    assert write(host, max_label_length=2)[1].plans


# A prefilled turn.


def test_a_prefilled_turn_goes_on_plainly() -> None:
    host, batch = writer(True), left_padded()
    options: dict[str, Any] = {"max_new_tokens": 20, "return_dict_in_generate": True}
    planned = host.generate(**batch, **PLANNED, **options)
    mixed = host.generate(**batch, **PLANNED, **options, continue_final_message=[True, False, True, False])
    plain = host.generate(**batch, strategy="planned_diffusion", **options, continue_final_message=True)
    for row, (goes_on, report) in enumerate(zip((True, False) * 2, mixed.report, strict=True)):
        assert bool(report.plans) != goes_on
        expected = plain if goes_on else planned
        length = min(mixed.sequences.shape[1], expected.sequences.shape[1])
        assert torch.equal(mixed.sequences[row, :length], expected.sequences[row, :length])
        assert any("continue_final_message" in note for note in report.fallbacks) == goes_on
    with pytest.raises(ValueError, match="3 entries for 4 sequences"):
        host.generate(**batch, **PLANNED, max_new_tokens=20, continue_final_message=[True] * 3)
    with pytest.raises(ValueError, match="exclude each other"):
        write(host, plan=Plan((Span((5,), 3),)), continue_final_message=True)


# Everything at once.


def random_call(rng: random.Random) -> dict[str, Any]:
    """Settings of a call whose text does not depend on ``max_new_tokens``."""
    call: dict[str, Any] = {
        "window_length": rng.choice((1, 3, 8)),
        "plan_window": rng.choice((0, 0, 5)),
        "draft_threshold": rng.choice((0.0, 0.5)),
        "visibility": rng.choice(("dag", "dag", "sparse", "dense")),
        "max_span_extension": rng.choice((1.0, 1.5, 4.0)),
        "max_rounds": rng.choice((1, 2, 8)),
        "max_parts": rng.choice((1, 3, 16)),
        "span_fallback_confidence": rng.choice((None, 0.2, 1.0)),
    }
    how = rng.choice(("verified", "verified", "span by span", "unverified", "blocks"))
    if call["visibility"] == "dense":
        how = "unverified"
    call |= {name: value for name, value in MODES[how].items() if name not in ("window_length", "draft_threshold")}
    if rng.random() < 0.4:
        call["max_rounds"] = max(call["max_rounds"], 2)
        call["max_parts"] = 16
        given = call["visibility"] != "dense"
        call["plan"] = [random_plan(rng, given) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.3:
        call |= {"stop_strings": [f"w{rng.choice(TEXT):02}"], "tokenizer": words()}
    if rng.random() < 0.3:
        call["min_new_tokens"] = rng.randint(1, 40)
    if rng.random() < 0.3:
        call |= {"do_sample": True, "seed": rng.randrange(99), "temperature": 0.8, "top_k": 0}
    return call


def random_plan(rng: random.Random, given: bool) -> Plan:
    spans: list[Span] = []
    for number in range(rng.randint(1, 4)):
        label, text = ([rng.choice(TEXT) for _ in range(rng.randint(1, 4))] for _ in range(2))
        depends = [part for part in range(number) if rng.random() < 0.4]
        spans.append(Span(label, rng.randint(1, 8), depends, text if given and rng.random() < 0.3 else None))  # type: ignore[arg-type]
    return Plan(tuple(spans), [rng.choice(TEXT)] * rng.randint(0, 2))  # type: ignore[arg-type]


def is_exact(call: dict[str, Any]) -> bool:
    return call.get("verify_spans", True) and call["visibility"] != "dense"


@pytest.mark.parametrize("part", range(3))
def test_random_calls(part: int) -> None:
    rng, cut = random.Random(part), 0
    hosts = [ending(seed) for seed in WRITERS] + [writer(True), table(64)]
    for _ in range(6):
        call, host = random_call(rng), rng.choice(hosts)
        new = rng.randint(call.get("min_new_tokens", 1), 40)
        batch = left_padded()
        options = {**PLANNED, **call, "return_dict_in_generate": True}
        try:
            longer = host.generate(**batch, **options, max_new_tokens=60)
        except ValueError as error:  # the plan alone is too long, which is told before the first pass
            assert "the given plan" in str(error) and host is hosts[-1] and "plan" in call, error
            continue
        needed = sum(len(p.lead) + sum(len(s.label) + len(s.text or ()) for s in p.spans) for p in call.get("plan", ()))
        together = host.generate(**batch, **options, max_new_tokens=max(new, needed))
        width = batch["input_ids"].shape[1]
        for row, report in enumerate(together.report):
            text = together.sequences[row, width:].tolist()[: report.num_tokens]
            assert not set(CONTROL.noise.banned) & set(text) and 0 <= len(text) <= max(new, needed)
            whole = longer.sequences[row, width:].tolist()[: longer.report[row].num_tokens]
            assert text == whole[: len(text)] and len(text) == min(max(new, needed), len(whole)), (call, row)
            assert report.ended == ("length" if len(text) < len(whole) else longer.report[row].ended)
            cut += report.ended == "length"
        row = rng.randrange(len(PROMPTS))
        seed = {"seed": call["seed"] + row} if "seed" in call else {}
        alone = host.generate(torch.tensor([PROMPTS[row]]), **{**options, **seed}, max_new_tokens=max(new, needed))
        one = alone.report[0]
        assert (
            alone.sequences[0, len(PROMPTS[row]) :].tolist()
            == together.sequences[row, width:].tolist()[: one.num_tokens]
        )
        assert [span.tokens for span in one.spans] == [span.tokens for span in together.report[row].spans]
        if is_exact(call):
            plain = {**options, "span_decoding": "autoregressive", "plan_window": 0}
            same = host.generate(**batch, **plain, max_new_tokens=max(new, needed))
            assert torch.equal(same.sequences, together.sequences)
        if host is hosts[-1]:
            continue
        tags = host.generate(**batch, **options, max_new_tokens=100, return_control_tokens=True)
        assert not {CONTROL.noise.mask, CONTROL.noise.filler} & set(tags.sequences[:, width:].flatten().tolist())
    assert cut > 2
