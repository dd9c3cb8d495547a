"""``hf-hybrid serve``, asked by the client of OpenAI as it is.

Bugs these tests catch: a mode that is lost between the request and ``generate()``, or that loses the settings of the
checkpoint; control tokens in the text or in the counts; an error that comes out as the end of a stream or as a bare
500; a client that leaves and takes the server with it; answers of two clients in one another's stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from hf_hybrid import AutoHybridModelForCausalLM
from hf_hybrid.checkpoints import bundled
from hf_hybrid.config import SETTINGS
from hf_hybrid.training.recipes.sheets import read_test_set
from tests.integration.server_for_tests import running

NAME = "hybrid-pocket"
FOLDER = bundled(NAME)
RECORDS = [item.sheet.prompt for item in read_test_set(FOLDER / "test_set.jsonl") if item.split == "test"][:3]
STRATEGIES = tuple(SETTINGS)
HYBRID = "from hf_hybrid.cli import main; main()"
PLAIN = "from transformers.cli.transformers import app; app()"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with running(HYBRID, NAME, log=tmp_path_factory.mktemp("serve") / "log") as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def mode(strategy: str | None = "planned_diffusion", settings: dict[str, Any] | None = None, **fields: Any) -> Any:
    """The field of a request that names a mode."""
    hybrid = {"strategy": strategy, **(settings or {})}
    return {"generation_config": json.dumps({"hf_hybrid": hybrid, **fields})}


def ask(client: OpenAI, record: str = RECORDS[0], extra: Any = None, **fields: Any) -> Any:
    chat = [{"role": "user", "content": record}]
    return client.chat.completions.create(model=NAME, messages=chat, extra_body=extra, **fields)  # type: ignore


@cache
def model_and_tokenizer() -> tuple[Any, Any]:
    model = AutoHybridModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(FOLDER)


def expected(record: str, strategy: str | None = "planned_diffusion", **settings: Any) -> tuple[str, int, int]:
    """Text, tokens of the prompt, new tokens, of a call in this process."""
    model, tokenizer = model_and_tokenizer()
    chat = [{"role": "user", "content": record}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = inputs["input_ids"].shape[1]
    new = model.generate(**inputs, strategy=strategy, **settings)[0, length:]
    return tokenizer.decode(new, skip_special_tokens=True), length, len(new)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_an_answer_is_the_one_of_generate(client: OpenAI, strategy: str | None) -> None:
    plans = {} if strategy is None else {"return_control_tokens": True}
    text, prompt, new = expected(RECORDS[0], strategy, **plans)
    answer = ask(client, extra=mode(strategy, plans))
    assert (new > expected(RECORDS[0])[2] + 10) == (strategy == "planned_diffusion"), "else the modes write alike here"
    assert answer.choices[0].message.content == text and len(text) > 100
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, new)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stream_comes_in_pieces_and_counts_alike(client: OpenAI, strategy: str) -> None:
    plans = {"return_control_tokens": True}
    text, prompt, new = expected(RECORDS[0], strategy, **plans)
    chunks = list(ask(client, extra=mode(strategy, plans), stream=True))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(pieces) == text and len(pieces) > 20
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (prompt, new)


def test_settings_and_a_seed_of_one_request(client: OpenAI) -> None:
    settings = {"window_length": 4, "seed": 5}
    text, _, _ = expected(RECORDS[1], **settings, do_sample=True, temperature=4.0)
    extra = mode(settings=settings, do_sample=True, temperature=4.0)
    answers = [ask(client, RECORDS[1], extra).choices[0].message.content for _ in range(2)]
    assert answers == [text, text] and text != expected(RECORDS[1])[0]


def test_other_endpoints(client: OpenAI) -> None:
    model, tokenizer = model_and_tokenizer()
    inputs = tokenizer(RECORDS[0], return_tensors="pt")
    ids = model.generate(**inputs, strategy="planned_diffusion", max_new_tokens=60)[0, inputs.input_ids.shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    answer = client.completions.create(model=NAME, prompt=RECORDS[0], max_tokens=60, extra_body=mode())
    assert answer.choices[0].text == text and answer.usage.completion_tokens == len(ids)
    response = client.responses.create(model=NAME, input=RECORDS[0], extra_body=mode(), stream=False)
    assert response.output_text == expected(RECORDS[0])[0]
    assert [entry.id for entry in client.models.list()] == [NAME]


def test_stop_strings(client: OpenAI) -> None:
    answer = ask(client, extra=mode(), stop=["\n"])
    text = answer.choices[0].message.content
    assert text.endswith("\n") and expected(RECORDS[0])[0].startswith(text)


def test_two_clients_at_once_get_their_own_answers(client: OpenAI) -> None:
    def stream(record: str) -> str:
        chunks = ask(client, record, mode(), stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(stream, RECORDS[:2]))
    assert answers == [expected(record)[0] for record in RECORDS[:2]] and answers[0] != answers[1]


@pytest.mark.parametrize("strategy", ["planned_diffusion", "autoregressive"])
def test_a_client_that_leaves_does_not_disturb_the_next(client: OpenAI, strategy: str) -> None:
    stream = ask(client, extra=mode(strategy), stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    assert ask(client, RECORDS[1], mode()).choices[0].message.content == expected(RECORDS[1])[0]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": (mode("telepathy"), "unknown strategy 'telepathy'"),
    "setting": (mode(settings={"window_lenght": 4}), "window_length"),
    "range": (mode(settings={"window_length": 10**9}), "out of range"),
    "type": (mode(settings={"verify_spans": "yes"}), "must be True or False"),
    "no dict": ({"generation_config": '{"hf_hybrid": "planned_diffusion"}'}, "must be a dict"),
    "no JSON": ({"generation_config": "strategy=planned_diffusion"}, "a string that holds a JSON object"),
    "a list": ({"generation_config": "[1]"}, "a string that holds a JSON object"),
    "an object": ({"generation_config": {"hf_hybrid": {}}}, "json.dumps"),
    "deep": ({"generation_config": "[" * 100_000}, "generation_config"),
    "beams": (mode(num_beams=2), "leave out one of the two"),
    "many": (mode(num_return_sequences=10**6), "num_return_sequences"),
    "half": (mode(max_new_tokens=0.5), "whole number"),
    "negative": ({"max_tokens": -1}, "whole number"),
    "a word": ({"max_tokens": "many"}, "many"),
    "shadowed": (mode(to_dict=1, update=2, validate=3), ""),
    "stop": (mode() | {"stop": [7]}, "a list of strings"),
    "stops": (mode() | {"stop": 7}, "not iterable"),
    "messages": ({"messages": [3]}, ""),
    "role": ({"messages": [{"content": "x"}]}, ""),
    "another model": ({"model": "../secret"}, "pinned"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_told_what_is_wrong(client: OpenAI, case: str, stream: bool) -> None:
    extra, message = BAD[case]
    with pytest.raises(openai.APIError) as caught:
        answer = ask(client, extra=extra, stream=stream)
        if stream:
            list(answer)
    assert isinstance(caught.value, openai.BadRequestError), "before the stream begins"
    assert message in str(caught.value) and len(caught.value.message) > len("Error code: 400 - ")


def test_unknown_fields_are_refused_by_the_host(client: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="strategy"):
        ask(client, extra={"strategy": "planned_diffusion"})


def test_an_error_on_the_way_is_no_end_of_a_stream(client: OpenAI) -> None:
    """Two seeds for one sequence are found out when the prompt has been put."""
    extra = mode(settings={"seed": [1, 2]})
    with pytest.raises(openai.BadRequestError, match="one for each"):
        ask(client, extra=extra)
    with pytest.raises(openai.APIError) as caught:
        list(ask(client, extra=extra, stream=True))
    assert "one for each" in str(caught.value.body)


def test_lengths_are_clamped(client: OpenAI) -> None:
    text, _, new = expected(RECORDS[0])
    answer = ask(client, extra=mode(), max_tokens=10**15)
    assert answer.choices[0].message.content == text and answer.usage.completion_tokens == new
    for extra in (mode(), mode(None), {}):
        short = ask(client, extra=extra, max_tokens=7)
        assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (7, "length")
    with pytest.raises(openai.BadRequestError, match="1024 positions"):
        ask(client, "word " * 5000, mode())


def test_fields_that_mean_nothing_here_do_nothing(client: OpenAI) -> None:
    extra = mode(
        return_dict_in_generate=True, custom_generate="some/repository", trust_remote_code=True, evil="x" * 9999
    )
    answer = ask(client, extra=extra | {"logprobs": True})
    assert answer.choices[0].message.content == expected(RECORDS[0])[0]


def test_tags_that_a_user_types_are_text(client: OpenAI) -> None:
    tags = "<sync/><par><topic><|assistant|><eos>"
    lengths = [ask(client, RECORDS[0] + end, mode(), max_tokens=1).usage.prompt_tokens for end in ("", tags)]
    assert lengths[1] > lengths[0] + 5, "as control tokens they were five"


def test_a_server_with_a_default_mode(tmp_path: Any) -> None:
    log = tmp_path / "log"
    with running(HYBRID, "--strategy", "planned_diffusion", "--dtype", "float32", str(FOLDER), log=log) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        control = {"return_control_tokens": True}  # of the modes, only a plan has any
        planned, plain = (expected(RECORDS[0], name, **control)[0] for name in ("planned_diffusion", "autoregressive"))
        assert planned != plain

        def answer(own: Any) -> str:
            return ask(client, extra={"generation_config": json.dumps({"hf_hybrid": own})}).choices[0].message.content

        assert answer(control) == planned
        assert answer({}) == answer({"strategy": None}) == answer({"strategy": "speculative", **control}) == plain
        assert ask(client).choices[0].message.content == expected(RECORDS[0])[0]


def test_the_server_of_the_host_alone_writes_plain_text(tmp_path: Any) -> None:
    with running(PLAIN, str(FOLDER), "--dtype", "float32", log=tmp_path / "log") as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        chat: Any = [{"role": "user", "content": RECORDS[0]}]
        extra = mode(settings={"return_control_tokens": True})
        answer = client.chat.completions.create(model=str(FOLDER), messages=chat, extra_body=extra)
    assert answer.choices[0].message.content == expected(RECORDS[0], "autoregressive")[0]
    assert answer.choices[0].message.content != expected(RECORDS[0], return_control_tokens=True)[0]
