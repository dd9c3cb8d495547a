"""Streamers get the prompt once, then the text in text order, and are ended once, whatever happens.

Bugs these tests catch: text of a later part shown before an earlier one is whole; tokens shown twice, or taken back;
control tokens on the screen; several tokens for a streamer that takes one; a streamer that never ends, so that the
thread that reads from it hangs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from hf_hybrid import Plan, Span
from tests.models_for_tests import CONTROL, hybrid, watching, words, writer

PROMPT = torch.tensor([[3, 7, 9, 2, 11]])
PLAN = Plan((Span((5,), 3), Span((6, 8), 4), Span((5,), 2, (0,))))
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": {"strategy": "autoregressive"},
    "block": {"strategy": "block_diffusion", "confidence_threshold": 0.3, "commit": "block"},
    "verified": {"strategy": "planned_diffusion", "draft_threshold": 0.0},
    "given": {"strategy": "planned_diffusion", "plan": PLAN},
    "unverified": {"strategy": "planned_diffusion", "verify_spans": False, "confidence_threshold": 0.3},
    "dense": {"strategy": "planned_diffusion", "visibility": "dense", "max_denoising_steps": 4},
}


class Recorder(BaseStreamer):
    """Keeps what it gets, in order."""

    def __init__(self) -> None:
        self.put_ids: list[list[int]] = []
        self.drafts: list[tuple[int, list[int]]] = []  # new tokens put so far, and the draft behind them
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert self.ends == 0, "nothing comes behind the end"
        first = not self.put_ids
        assert value.shape == PROMPT.shape if first else value.shape == (1,), "a token at a time, as from the host"
        self.put_ids.append(value.flatten().tolist())

    def put_draft(self, value: Tensor) -> None:
        assert self.ends == 0 and value.ndim == 1 and len(value) > 0
        self.drafts.append((sum(map(len, self.put_ids[1:])), value.tolist()))

    def end(self) -> None:
        self.ends += 1


def generate(streamer: Any, host: Any = None, **settings: Any) -> list[int]:
    host = host or writer(settings["strategy"] == "planned_diffusion")
    ids = host.generate(PROMPT, streamer=streamer, max_new_tokens=60, **settings)
    return ids[0, PROMPT.shape[1] :].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_prompt_and_then_the_text_in_order(mode: str) -> None:
    recorder = Recorder()
    text = generate(recorder, **MODES[mode])
    assert recorder.put_ids[0] == PROMPT[0].tolist()
    assert [token for ids in recorder.put_ids[1:] for token in ids] == text
    assert recorder.ends == 1 and not set(CONTROL.noise.banned) & set(text)
    assert len(recorder.put_ids) > 2 or mode == "dense", "in pieces"


class OneByOne(BaseStreamer):
    """Takes one token at a time, as the host gives them for a batch of one."""

    def __init__(self) -> None:
        self.tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []  # the prompt
        else:
            self.tokens.append(int(value))

    def end(self) -> None:
        pass


@pytest.mark.parametrize("mode", [*MODES, "speculative", "host"])
def test_a_streamer_that_takes_one_token(mode: str) -> None:
    streamer = OneByOne()
    options = {"speculative": {"strategy": "speculative", "adaptive": False}, "host": {"strategy": None}, **MODES}[mode]
    assert generate(streamer, **options) == streamer.tokens


@pytest.mark.parametrize("mode", ["block", "verified", "given", "dense"])
def test_drafts_show_open_positions_and_settle_to_the_text(mode: str) -> None:
    recorder = Recorder()
    text = generate(recorder, **MODES[mode])
    assert any(CONTROL.noise.mask in draft for _, draft in recorder.drafts)
    puts = [sum(map(len, recorder.put_ids[1:n])) for n in range(1, len(recorder.put_ids) + 1)]
    assert {shown for shown, _ in recorder.drafts} <= set(puts), "a draft follows what was put"
    if mode == "block":  # what a block settled stays
        for shown, draft in recorder.drafts:
            pairs = zip(draft, text[shown:], strict=False)
            assert all(token in (CONTROL.noise.mask, final) for token, final in pairs)


@pytest.mark.parametrize("mode", MODES)
def test_text_streamers_of_the_host_show_the_decoded_text(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = words()
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=5)
    text = generate(iterator, **MODES[mode])
    expected = tokenizer.decode(text, skip_special_tokens=True)
    assert "".join(iterator) == expected and len(expected) > 20
    generate(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **MODES[mode])
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("mode", ["autoregressive", "block", "verified"])
def test_an_error_on_the_way_ends_the_streamer_once(mode: str) -> None:
    host, recorder, passes = writer(MODES[mode]["strategy"] == "planned_diffusion"), Recorder(), 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise RuntimeError("out of memory")

    hook = host.model.register_forward_pre_hook(watching(fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(recorder, host, **MODES[mode])
    hook.remove()
    assert recorder.ends == 1
    again = Recorder()
    assert generate(again, host, **MODES[mode]) == [token for ids in again.put_ids[1:] for token in ids]


def test_an_error_of_the_streamer_ends_it_once() -> None:
    class Broken(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if len(self.put_ids) == 3:
                raise OSError("the reader went away")

    broken = Broken()
    with pytest.raises(OSError, match="went away"):
        generate(broken, **MODES["verified"])
    assert broken.ends == 1


def test_a_refused_call_ends_the_streamer_too() -> None:
    """The host has put the prompt by then, and a thread may be reading."""
    recorder = Recorder()
    with pytest.raises(ValueError, match="order the parts"):
        generate(recorder, strategy="planned_diffusion", plan=Plan((Span((5,), 3, (1,)), Span((6,), 3))))
    assert recorder.ends == 1


class Clock(Recorder):
    """Notes the number of the pass behind which something came."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.passes, self.noisy = 0, 0  # passes so far; the first that carried an open position
        self.first_text = self.first_draft = 0
        self.hook = host.model.register_forward_pre_hook(watching(self.note), with_kwargs=True)

    def note(self, _: Any, arguments: tuple[Any, ...], names: dict[str, Any]) -> None:
        ids = names["input_ids"] if "input_ids" in names else arguments[0]
        self.passes += 1
        if not self.noisy and bool((ids == CONTROL.noise.mask).any()):
            self.noisy = self.passes

    def put(self, value: Tensor) -> None:
        super().put(value)
        self.first_text = self.first_text or self.passes

    def put_draft(self, value: Tensor) -> None:
        super().put_draft(value)
        self.first_draft = self.first_draft or self.passes

    def end(self) -> None:
        super().end()
        self.hook.remove()


@pytest.mark.parametrize("mode", ["block", "verified", "given", "unverified", "dense"])
def test_drafts_are_shown_from_the_first_pass_with_open_positions(mode: str) -> None:
    host = writer(MODES[mode]["strategy"] == "planned_diffusion")
    clock = Clock(host)
    generate(clock, host, **MODES[mode])
    assert 0 < clock.first_draft <= clock.noisy < clock.passes
    assert CONTROL.noise.mask in clock.drafts[0][1]


def test_parts_are_shown_while_the_plan_grows() -> None:
    """A plan is no text: the first part is shown as it is written, not when the last one has been planned."""
    host = writer(planned=True)
    clock = Clock(host)
    text = generate(clock, host, strategy="planned_diffusion")
    out = host.generate(PROMPT, strategy="planned_diffusion", max_new_tokens=60, return_dict_in_generate=True)
    assert len(out.report[0].plans[0].spans) > 1 and [t for ids in clock.put_ids[1:] for t in ids] == text
    planning = 2 * len(out.report[0].plans[0].spans)  # token by token: a label and a length each
    assert clock.first_text < planning


@pytest.mark.parametrize("settings", [{}, {"verify_spans": False, "confidence_threshold": 0.3}, {"plan_window": 4}])
def test_nothing_is_taken_back_however_little_room_there_is(settings: dict[str, Any]) -> None:
    """What is planned later may take the room of a part that outgrew its plan."""
    cut = 0
    for weights in (26, 3, 9):
        host = hybrid(seed=weights)
        for room in range(6, 64, 3):
            recorder = Recorder()
            options = {"strategy": "planned_diffusion", "max_span_extension": 4.0, **settings}
            out = host.generate(PROMPT, streamer=recorder, max_new_tokens=room, return_dict_in_generate=True, **options)
            assert [token for ids in recorder.put_ids[1:] for token in ids] == out.sequences[0, 5:].tolist()
            cut += any("cut" in note for note in out.report[0].fallbacks)
    assert cut > 5


def test_a_stop_string_in_a_part_while_the_plan_grows() -> None:
    host, tokenizer = writer(planned=True), words()
    plain = generate(Recorder(), host, strategy="planned_diffusion")
    stop = tokenizer.decode(plain[1:2])
    recorder = Recorder()
    options = {"strategy": "planned_diffusion", "stop_strings": [stop], "tokenizer": tokenizer, "max_new_tokens": 60}
    out = host.generate(PROMPT, streamer=recorder, return_dict_in_generate=True, **options)
    end = plain.index(plain[1]) + 1
    assert out.sequences[0, 5:].tolist() == plain[:end] == [token for ids in recorder.put_ids[1:] for token in ids]
    report = out.report[0]
    assert len(report.spans) == sum(len(plan.spans) for plan in report.plans) > 0
