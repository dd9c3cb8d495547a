"""``pipeline()``: a strategy at construction and per call, by object and by name; the task that tells plan and parts.

Bugs these tests catch: a strategy that is lost between the pipeline and ``generate()``; rows of a padded batch that
differ from batches of one; reports that belong to the wrong prompt; results that JSON does not take; a saved
pipeline that asks everyone to trust its code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_for_tests import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer
from transformers.pipelines import PIPELINE_REGISTRY

import hf_hybrid
from hf_hybrid import HybridTextGenerationPipeline, Plan, Span, UnsupportedCallError
from hf_hybrid.checkpoints import bundled
from hf_hybrid.cli.plan import from_json
from hf_hybrid.cli.prompts import encode
from hf_hybrid.config import SETTINGS

POCKET = bundled("hybrid-pocket")
RECORD = "Population: 4,512,000\nCapital: Port Amel\nArea: 12,300 sq km\nClimate: mild, wet winters\nAirports: 7 (2024)"
SHORT = "Capital: Lima\nAirports: 3"
CHAT = [{"role": "user", "content": RECORD}]
STRATEGIES = tuple(SETTINGS)
LENGTH: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}  # the pipeline of 5.15 samples unless it is told


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, Any]:
    model = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(POCKET)


@pytest.fixture
def registered() -> Iterator[None]:
    hf_hybrid.register_pipeline()
    yield
    PIPELINE_REGISTRY.supported_tasks.pop("hybrid-text-generation")


def pipe(pocket: tuple[Any, Any], task: str = "text-generation", **options: Any) -> Any:
    model, tokenizer = pocket
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", **options)


def direct(pocket: tuple[Any, Any], prompt: str | list[Any] = RECORD, **options: Any) -> str:
    """What ``generate()`` writes behind a prompt."""
    model, tokenizer = pocket
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    ids = model.generate(**inputs, **{**LENGTH, **options})
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# The host's own task.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strings_and_chats(pocket: Any, strategy: str) -> None:
    write = pipe(pocket)
    options = {"strategy": strategy, **LENGTH}
    text = direct(pocket, strategy=strategy)
    assert write(RECORD, **options) == [{"generated_text": RECORD + text}] and len(text) > 40
    assert write(RECORD, return_full_text=False, **options) == [{"generated_text": text}]
    (ids,) = write(RECORD, return_tensors=True, **options)
    assert pocket[1].decode(ids["generated_token_ids"], skip_special_tokens=True) == RECORD + text
    answer = {"role": "assistant", "content": direct(pocket, CHAT, strategy=strategy)}
    assert write(CHAT, **options) == [{"generated_text": [*CHAT, answer]}]


def test_a_strategy_of_the_pipeline_and_one_of_the_call(pocket: Any) -> None:
    shown = {"return_control_tokens": True}  # the plan's labels: the texts are alike here
    write = pipe(pocket, strategy="planned_diffusion", return_full_text=False, **shown, **LENGTH)
    planned, plain = (direct(pocket, strategy=name, **shown) for name in ("planned_diffusion", "autoregressive"))
    assert planned != plain
    assert write(RECORD) == write(RECORD, window_length=4) == [{"generated_text": planned}]
    assert write(RECORD, strategy="autoregressive") == [{"generated_text": plain}]
    # A config of the call replaces the host's arguments of the pipeline, not the strategy.
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    assert write(RECORD, generation_config=config) == [
        {"generated_text": direct(pocket, strategy="planned_diffusion", max_new_tokens=12, **shown)}
    ]
    named = GenerationConfig(hf_hybrid={"strategy": "autoregressive"}, **LENGTH)
    assert pipe(pocket, return_full_text=False)(RECORD, generation_config=named) == [{"generated_text": plain}]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_padded_batch_equals_single_prompts(pocket: Any, strategy: str) -> None:
    write = pipe(pocket, strategy=strategy, **LENGTH)
    prompts = [RECORD, SHORT, RECORD.replace("Amel", "Este")]
    single = [write(prompt) for prompt in prompts]
    assert write(prompts, batch_size=3) == write(prompts, batch_size=2) == single
    assert write([CHAT, [{"role": "user", "content": SHORT}]], batch_size=2)[0] == write(CHAT)


def test_streamers_stop_strings_and_more_than_one_sequence(pocket: Any) -> None:
    write = pipe(pocket, strategy="planned_diffusion", return_full_text=False, **LENGTH)
    text = direct(pocket, strategy="planned_diffusion")
    streamer = TextIteratorStreamer(pocket[1], skip_prompt=True, skip_special_tokens=True, timeout=5)
    assert write(RECORD, streamer=streamer) == [{"generated_text": text}]
    assert "".join(streamer) == text
    ending = text[: text.index("\n") + 1]
    assert write(RECORD, stop_strings=["\n"], tokenizer=pocket[1]) == [{"generated_text": ending}]
    with pytest.raises(UnsupportedCallError, match="tokenizer=tokenizer"):
        write(RECORD, stop_strings=["\n"])
    sampled = write(RECORD, do_sample=True, temperature=4.0, seed=3, num_return_sequences=3)
    assert len({record["generated_text"] for record in sampled}) > 1
    assert sampled == write(RECORD, do_sample=True, temperature=4.0, seed=3, num_return_sequences=3)


def test_a_stop_sequence_ends_the_text(pocket: Any) -> None:
    """Not with a plan: the pipeline of 5.15 makes the sequence the end token, which no part may hold."""
    write = pipe(pocket, strategy="autoregressive", return_full_text=False, **LENGTH)
    text = direct(pocket, strategy="autoregressive")
    shown = write(RECORD, stop_sequence="\n")[0]["generated_text"]
    # 5.15 takes the token of the sequence alone for the end: a line break inside of another token goes on there.
    assert text.startswith(shown) and len(shown) < len(text)


def test_an_assistant_model(pocket: Any) -> None:
    write = pipe(pocket, assistant_model=pocket[0], return_full_text=False, **LENGTH)
    text = direct(pocket, strategy="speculative")
    assert write(RECORD, strategy="speculative") == [{"generated_text": text}]
    with pytest.raises(UnsupportedCallError, match="assistant_model"):
        write(RECORD, strategy="planned_diffusion")
    assert write(RECORD) == [{"generated_text": text}]  # the host's own way


def test_a_given_plan(pocket: Any) -> None:
    label = tuple(pocket[1]("## People\n", add_special_tokens=False).input_ids)
    write = pipe(pocket, strategy="planned_diffusion", return_full_text=False, **LENGTH)
    shown = write(RECORD, plan=Plan((Span(label, 16),)))[0]["generated_text"]
    assert shown.startswith("## People\n") and not direct(pocket, strategy="planned_diffusion").startswith("## People")


def test_by_name_after_install(pocket: Any, installed: None) -> None:
    options = {"strategy": "planned_diffusion", "return_full_text": False, **LENGTH}
    write = transformers.pipeline("text-generation", model=str(POCKET), dtype=torch.float32, device="cpu", **options)
    assert write(RECORD) == [{"generated_text": direct(pocket, strategy="planned_diffusion")}]
    assert type(write.model) is not type(pocket[0])  # a class of the host, which install() taught


def test_mistakes_are_told(pocket: Any) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        pipe(pocket)(RECORD, strategy="telepathy")
    with pytest.raises(ValueError, match="did you mean 'window_length'"):
        pipe(pocket, strategy="block_diffusion", window_lenght=4)(RECORD)


# The task that tells more.


def check_record(record: dict[str, Any], tokenizer: Any, text: str) -> None:
    assert record["generated_text"] == text
    assert json.loads(json.dumps(record)) == record
    parts = [part for entry in record["plan"]["rounds"] for part in entry["parts"]]
    assert [span["label"] for span in record["spans"]] == [part["label"] for part in parts]
    assert all(
        span["text"].strip() in text and span["tokens"] <= record["report"]["num_tokens"] for span in record["spans"]
    )
    assert from_json(record["plan"], tokenizer)[0].spans[0].length == parts[0]["length"]
    assert record["report"]["strategy"] == "planned_diffusion" and record["report"]["num_forwards"] > 1
    assert record["report"]["ended"] in ("eos", "length")
    assert record["report"]["seconds"]["total"] > 0 and "plans" not in record["report"]


def test_the_task_tells_plan_parts_and_report(pocket: Any, registered: None) -> None:
    options = {"strategy": "planned_diffusion", "return_full_text": False, **LENGTH, "max_new_tokens": 120}
    write = pipe(pocket, "hybrid-text-generation", **options)
    (record,) = write(RECORD)
    assert list(record) == ["generated_text", "plan", "spans", "report"]
    text = direct(pocket, strategy="planned_diffusion", max_new_tokens=120)
    check_record(record, pocket[1], text)
    assert len(record["spans"]) > 1 and record["report"]["ended"] == "eos"
    assert write(RECORD, max_new_tokens=20)[0]["report"]["ended"] == "length"
    (chat,) = write(CHAT, return_full_text=True)
    answer = chat["generated_text"][-1]["content"]
    check_record({**chat, "generated_text": answer}, pocket[1], answer)
    shown = write(RECORD, stop_strings=["\n"])[0]  # the pipeline has the tokenizer
    assert shown["generated_text"] == text[: text.index("\n") + 1]


def test_a_prefilled_turn_goes_on_without_a_plan(pocket: Any, registered: None) -> None:
    model, tokenizer = pocket
    options = {"strategy": "planned_diffusion", **LENGTH}
    write = pipe(pocket, "hybrid-text-generation", **options)
    chat = [*CHAT, {"role": "assistant", "content": "## People\n"}]
    inputs = tokenizer.apply_chat_template(chat, continue_final_message=True, return_tensors="pt", return_dict=True)
    plain = model.generate(**inputs, strategy="autoregressive", **LENGTH)
    text = tokenizer.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    (record,) = write(chat)
    assert record["generated_text"][-1]["content"] == "## People\n" + text and record["plan"] is None
    assert any("continue_final_message" in note for note in record["report"]["fallbacks"])
    told = model.generate(**inputs, continue_final_message=True, **options)
    assert torch.equal(told, plain) and not torch.equal(model.generate(**inputs, **options), plain)
    # Beside a chat that begins an answer, with several sequences each, and for the other strategies.
    together = write([chat, CHAT], batch_size=2, do_sample=True, temperature=1.0, top_k=1, num_return_sequences=2)
    assert [[r["plan"] is None for r in records] for records in together] == [[True, True], [False, False]]
    assert together[0][0]["generated_text"] == record["generated_text"]
    assert write(chat, strategy="autoregressive")[0]["generated_text"] == record["generated_text"]
    assert write(CHAT, continue_final_message=True)[0]["plan"] is None
    with pytest.raises(ValueError, match="exclude each other"):
        write(chat, plan=Plan((Span(tuple(tokenizer("## People", add_special_tokens=False).input_ids), 16),)))


def test_reports_stand_beside_their_prompts(pocket: Any) -> None:
    model, tokenizer = pocket
    write = HybridTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu", strategy="planned_diffusion")
    prompts, options = (
        [RECORD, SHORT, CHAT[0]["content"].replace("Amel", "Este")],
        {"return_full_text": False, **LENGTH},
    )
    single = [write(prompt, **options) for prompt in prompts]
    together = write(prompts, batch_size=2, **options)
    for alone, beside in zip(single, together, strict=True):
        assert [r["generated_text"] for r in alone] == [r["generated_text"] for r in beside]
        assert [r["plan"] for r in alone] == [r["plan"] for r in beside]
        assert [r["report"]["num_tokens"] for r in alone] == [r["report"]["num_tokens"] for r in beside]
    sampling = {**options, "do_sample": True, "temperature": 1.5, "seed": 1, "num_return_sequences": 2}
    several = write(prompts[:2], batch_size=2, **sampling)
    assert [len(records) for records in several] == [2, 2]
    for record in (record for records in several for record in records):
        check_record(record, tokenizer, record["generated_text"])


def test_other_ways_of_writing_have_no_plan(pocket: Any, registered: None) -> None:
    write = pipe(pocket, "hybrid-text-generation", return_full_text=False, **LENGTH)
    (host,) = write(RECORD)
    plain = direct(pocket, strategy="autoregressive")
    assert host == {"generated_text": plain, "plan": None, "spans": [], "report": None}
    config = GenerationConfig(hf_hybrid={"strategy": "speculative"}, **LENGTH)
    (drafted,) = write(RECORD, generation_config=config)
    assert (drafted["generated_text"], drafted["plan"], drafted["spans"]) == (plain, None, [])
    assert drafted["report"]["drafting"]["drafter"] == "suffix"
    assert config.return_dict_in_generate is None, "the caller's config is the caller's"


def test_the_task_by_name_and_saved(tmp_path: Path, registered: None) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write = transformers.pipeline("hybrid-text-generation", model=str(folder), device="cpu")
    assert isinstance(write, HybridTextGenerationPipeline)
    (record,) = write("Capital: Lima", strategy="planned_diffusion", do_sample=False)
    assert record["report"]["num_tokens"] > 0
    write.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    again = transformers.pipeline("hybrid-text-generation", model=str(tmp_path / "again"), device="cpu")
    (same,) = again("Capital: Lima", strategy="planned_diffusion", do_sample=False)
    assert same["generated_text"] == record["generated_text"]


def test_registering_twice_is_silent_and_a_plain_model_is_enabled(
    registered: None, pocket: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hf_hybrid.register_pipeline()
    assert "already registered" not in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    write = pipe((plain, pocket[1]), "hybrid-text-generation", return_full_text=False, **LENGTH)
    (record,) = write(RECORD, strategy="planned_diffusion")
    assert record["generated_text"] == direct(pocket, strategy="planned_diffusion")


def test_a_chat_on_the_command_line_is_continued_when_it_is_asked_for(pocket: Any) -> None:
    tokenizer = pocket[1]
    chat = [*CHAT, {"role": "assistant", "content": "## People\n"}]
    expected = tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=True)["input_ids"]
    goes_on, anew = (encode(tokenizer, chat, True, continues)["input_ids"][0].tolist() for continues in (True, False))
    assert goes_on == expected and anew[: len(expected)] == expected and len(anew) > len(expected)
