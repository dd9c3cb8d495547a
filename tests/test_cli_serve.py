"""``hf-hybrid serve`` up to the point where a server starts (``tests/integration`` asks one).

Bugs these tests catch: a command that fails with a traceback without its extra; a mode of the server that bypasses
``generate()``; a plan that is cut and told as a normal end; options that do not reach the host's command, or whose
values are taken for the model; an error of a stream that looks like its end.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.cli.serve
import typer
from transformers import GenerationConfig
from transformers.utils import import_utils
from typer.testing import CliRunner

from hf_hybrid.checkpoints import bundled
from hf_hybrid.cli import app
from hf_hybrid.cli.command import UsageError
from hf_hybrid.cli.folder import LoadingError
from hf_hybrid.cli.serve import model_and_type
from hf_hybrid.cli.served import Answering, Streamed, check_body, prepare
from tests.models_for_tests import CONTROL, FAVOURS, hybrid, words

POCKET = str(bundled("hybrid-pocket"))


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_without_the_extra_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = call()
    assert result.exit_code == 1 and 'pip install "hf-hybrid[serving]"' in result.stderr


def test_help_names_the_field_and_the_extra() -> None:
    text = " ".join(call("--help").output.split())
    assert "hf-hybrid[serving]" in text and "generation_config" in text and "--strategy" in text


def test_options_go_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of the host's command decides what is a value and what is the model."""
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    seen: list[dict[str, Any]] = []

    def note(options: dict[str, Any], typed: bool) -> str:
        seen.append({**options, "typed": typed})
        raise UsageError("enough")

    monkeypatch.setattr("hf_hybrid.cli.serve.model_and_type", note)
    result = call("--dtype", "bfloat16", "--strategy", "speculative", "some/model", "--port=8123", "--enable-cors")
    assert result.exit_code == 2 and "enough" in result.stderr
    (options,) = seen
    assert (options["force_model"], options["dtype"], options["port"]) == ("some/model", "bfloat16", 8123)
    assert options["enable_cors"] is True and options["host"] == "localhost" and options["typed"]
    for wrong in (["--prot", "1"], ["--port", "many"], ["one", "two"]):
        result = call(*wrong)
        assert result.exit_code == 2 and "transformers serve --help" in result.stderr
    assert call("--strategy", "telepathy").exit_code == 2 and len(seen) == 1


def test_the_model_and_what_would_bypass_a_strategy(tmp_path: Path) -> None:
    options: dict[str, Any] = {"force_model": None, "dtype": "auto"}
    assert model_and_type(options, typed=False) == "hybrid-pocket"
    assert options == {"force_model": POCKET, "dtype": "float32"}
    options = {"force_model": "hybrid-pocket", "dtype": "bfloat16"}
    assert model_and_type(options, typed=True) == "hybrid-pocket" and options["dtype"] == "bfloat16"
    (tmp_path / "model.safetensors").touch()
    options = {"force_model": str(tmp_path), "dtype": "auto"}
    assert model_and_type(options, typed=False) == tmp_path.name and options["dtype"] == "auto"
    options = {"force_model": "owner/name"}
    assert model_and_type(options, typed=False) == "owner/name" == options["force_model"]
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LoadingError, match="is a pickle"):
        model_and_type({"force_model": str(tmp_path)}, typed=False)
    with pytest.raises(UsageError, match="continuous-batching"):
        model_and_type({"continuous_batching": True}, typed=False)
    with pytest.raises(UsageError, match=r"no folder smollm2; .*python -m benchmarks\.smollm2 smollm2"):
        model_and_type({"force_model": "smollm2"}, typed=False)


@pytest.mark.parametrize("field", [3, {"hf_hybrid": {}}, "[]", "null", "{", "[" * 100_000])
def test_a_field_that_is_no_object_in_a_string(field: Any) -> None:
    with pytest.raises(ValueError, match="a string that holds a JSON object"):
        check_body({"generation_config": field})
    check_body({"generation_config": '{"hf_hybrid": {}}'})
    check_body({"messages": []})


def prepared(config: GenerationConfig, strategy: str | None = None, stored: Any = None, length: int = 5) -> Any:
    """The settings with which ``generate()`` will decode this config, None: the host's decoding."""
    model = hybrid()
    model.generation_config.hf_hybrid = stored
    inputs = {"input_ids": torch.full((1, length), 3)}
    prepare(model, words(), inputs, config, strategy)
    assert config.return_dict_in_generate is False
    seen = model.generate(**inputs, generation_config=config) if config.max_new_tokens < 9 else None
    return seen, config


def test_lengths_are_bounded_by_the_positions_of_the_model() -> None:
    for given, expected in ((10**15, 123), (7, 7), (None, 123)):
        _, config = prepared(GenerationConfig(max_new_tokens=given))
        assert config.max_new_tokens == expected
    _, config = prepared(GenerationConfig(max_length=45))
    assert (config.max_new_tokens, config.max_length) == (40, None)
    for wrong in (0, -3, True, "7", 0.5):
        config = GenerationConfig()
        config.max_new_tokens = wrong  # type: ignore
        with pytest.raises(ValueError, match="whole number"):
            prepared(config)
    with pytest.raises(ValueError, match="128 positions"):
        prepared(GenerationConfig(), length=128)


def test_a_request_may_name_a_strategy_as_a_field_of_its_own() -> None:
    from hf_hybrid.routing import named_strategy

    config = GenerationConfig(strategy="speculative", draft_length=3, max_new_tokens=4, do_sample=False)
    model = hybrid()
    for default in (None, "block_diffusion"):
        prepare(model, words(), {"input_ids": torch.full((1, 5), 3)}, config, default)
        assert named_strategy(model, {"generation_config": config}) == "speculative"


def test_a_default_strategy_stands_behind_request_and_checkpoint() -> None:
    named = {"strategy": "speculative"}
    for given, stored, expected in (
        (None, None, "block_diffusion"),
        ({"window_length": 4}, None, "block_diffusion"),
        (None, {"window_length": 4}, "block_diffusion"),
        (named, None, "speculative"),
        (None, named, None),  # what the checkpoint names needs no word of the request
        ({}, None, None),
        ({"strategy": None}, None, None),
    ):
        config = GenerationConfig(hf_hybrid=given, max_new_tokens=4, do_sample=False)
        prepared(config, "block_diffusion", stored)
        assert ((getattr(config, "hf_hybrid", None) or {}).get("strategy")) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"num_return_sequences": 2},
        {"num_beams": 10**9},
        {"num_beams": 2, "hf_hybrid": {"strategy": "block_diffusion"}},
        {"hf_hybrid": {"strategy": "telepathy"}},
        {"strategy": "telepathy"},
        {"strategy": "block_diffusion", "window_length": 0},
        {"hf_hybrid": ["planned_diffusion"]},
        {"hf_hybrid": {"strategy": "block_diffusion", "window_length": 0}},
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_anything_is_written(fields: dict[str, Any]) -> None:
    config = GenerationConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError):
        prepared(config, "block_diffusion")


class Recorder:
    """A streamer of the host's server."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Any) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.seen.append("end")


def test_only_a_whole_answer_ends_its_stream() -> None:
    def write(streamer: Any, text: str | None) -> None:
        streamer.put("prompt")
        streamer.end()  # as the decoding loop does, whatever happened
        if text is not None:
            raise OSError(text)

    for text, message in ((None, None), ("plain", "plain"), ('a "b"\nc', 'a \\"b\\"\\nc')):
        recorder = Recorder()
        model = Streamed(SimpleNamespace(generate=write, config="its own"), GenerationConfig())
        assert model.config == "its own"
        if text is None:
            model.generate(streamer=recorder, text=text)
        else:
            with pytest.raises((OSError, RuntimeError)) as caught:
                model.generate(streamer=recorder, text=text)
            assert str(caught.value) == message
        assert recorder.seen == ["prompt", "end"] if text is None else ["prompt"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_is_told_how_a_planned_answer_ended(stream: bool) -> None:
    """The host compares the number of tokens with ``max_new_tokens``."""
    host = hybrid(
        seed=7, favours={**FAVOURS, CONTROL.noise.end: 9.0, CONTROL.tags.async_: 7.0}
    )  # three parts, and an end
    ids = torch.tensor([[3, 7, 9, 2, 11]])

    def finish_reason(model: Any, most: int) -> tuple[str, int]:
        config = GenerationConfig(max_new_tokens=most, do_sample=False)
        prepare(model, words(), {"input_ids": ids}, config, "planned_diffusion")
        recorder = Recorder()
        if stream:
            Streamed(model, config).generate(input_ids=ids, generation_config=config, streamer=recorder)
            new = sum(len(put) for put in recorder.seen[1:-1])
        else:
            new = Answering(model, config).generate(input_ids=ids, generation_config=config).shape[1] - ids.shape[1]
        return ("length" if new >= config.max_new_tokens else "stop"), new  # type: ignore[operator]

    reason, whole = finish_reason(host, 100)
    assert (reason, whole < 100) == ("stop", True)
    assert finish_reason(host, whole) == ("stop", whole), "an end token at the last position ends it"
    for most in range(1, whole):
        assert finish_reason(host, most) == ("length", most)
    table = hybrid("gpt2", seed=26, favours={**FAVOURS, CONTROL.noise.filler: -99.0}, n_positions=64)
    reason, new = finish_reason(table, 59)
    assert reason == "length" and new < 59, "the plan took positions, and no text needs to fill the rest"


def test_the_host_has_what_is_called() -> None:
    names = typer.main.get_command(_command()).params
    assert {"force_model", "continuous_batching", "dtype", "host", "port"} <= {param.name for param in names}


def _command() -> typer.Typer:
    made = typer.Typer()
    made.command()(transformers.cli.serve.Serve)
    return made
