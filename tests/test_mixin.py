"""The ways in: generate(strategy=), enable(), install(), the Auto class. A stub that looks replaces the decoding loop.

Bugs these tests catch: a strategy that leaks into plain or assistant calls; a streamer that gets the prompt twice or
never; stop strings lost between host and loop; a giant max_new_tokens that sizes a cache; a class that breaks pickle,
copies, saving, pipelines; settings dropped by a save and a load; an instance ``generate`` that
hides the mixin.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_for_tests import VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StopStringCriteria,
)
from transformers.utils import ModelOutput

import hf_hybrid
from hf_hybrid import HybridGenerationMixin, Plan, SettingsError, UnsupportedCallError, routing

Seen = list[dict[str, Any]]
PROMPT, NEW = torch.tensor([[3, 4, 5]]), 7  # (1, 3)
ROOT = Path(__file__).parents[1]


def llama(**changes: Any) -> Any:
    model = tiny("llama", bos_token_id=0, eos_token_id=1, pad_token_id=2, **changes)
    model.generation_config.max_new_tokens = 8  # the host warns when no length is set at all
    return model


def words() -> PreTrainedTokenizerFast:
    vocab = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCAB - 1)}
    vocab["abcdef"] = VOCAB - 1  # StopStringCriteria spells every token behind this word
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>"}
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special)


def encoder_decoder() -> Any:
    small = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**small, decoder_start_token_id=0))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the stubbed loop received, one dict a call; the stub appends the token NEW to every sequence."""
    calls: Seen = []

    def decode(model: Any, input_ids: Any, **kw: Any) -> Any:
        calls.append({"model": model, "input_ids": input_ids, **kw})
        new = torch.full((input_ids.shape[0], 1), NEW)  # (batch, 1)
        streamer = kw["call"].streamer
        if streamer is not None:
            streamer.put(new[0])
            streamer.end()
        ids = torch.cat([input_ids, new], 1)  # (batch, prompt + 1)
        return ModelOutput(sequences=ids) if kw["generation_config"].return_dict_in_generate else ids

    monkeypatch.setattr(routing, "decode", decode)
    return calls


@pytest.fixture
def host_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The host's logger does not propagate to the root, where caplog listens: attach it there."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_plain_calls_are_the_hosts(seen: Seen) -> None:
    host, model = llama(), hf_hybrid.enable(llama())
    arguments = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(PROMPT, **arguments), host.generate(PROMPT, **arguments))
    config = GenerationConfig(**arguments)
    assert torch.equal(model.generate(PROMPT, config), host.generate(PROMPT, config))
    torch.manual_seed(3)
    sampled = host.generate(PROMPT, do_sample=True, max_new_tokens=6)
    torch.manual_seed(3)
    assert torch.equal(model.generate(PROMPT, do_sample=True, max_new_tokens=6), sampled)
    assert torch.equal(
        model.generate(PROMPT, num_beams=2, **arguments), host.generate(PROMPT, num_beams=2, **arguments)
    )
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(PROMPT, not_an_argument=1)
    assert seen == []


def test_strategy_of_call_then_of_its_config_then_of_the_model(seen: Seen) -> None:
    model = hf_hybrid.enable(llama())
    model.generation_config.hf_hybrid = {"strategy": "block_diffusion", "window_length": 4}
    assert model.generate(PROMPT, max_new_tokens=5).tolist() == [[3, 4, 5, NEW]]
    model.generate(PROMPT, max_new_tokens=5, strategy="autoregressive", seed=9)
    model.generate(PROMPT, GenerationConfig(max_new_tokens=5, hf_hybrid={"strategy": "planned_diffusion"}))
    model.generate(PROMPT, max_new_tokens=5, window_length=16)
    names = ["block_diffusion", "autoregressive", "planned_diffusion", "block_diffusion"]
    assert [c["call"].strategy for c in seen] == names
    lengths = [getattr(c["call"].settings, "window_length", None) for c in seen]
    assert lengths == [4, None, 4, 16], "a config of the call that names a strategy leaves the settings of the model"
    assert seen[1]["call"].settings.seed == 9 and seen[1]["generation_config"].max_length == 8
    model.generate(PROMPT, GenerationConfig(max_new_tokens=2, do_sample=False, hf_hybrid={}))  # asks for the host
    model.generate(PROMPT, max_new_tokens=2, custom_generate=lambda m, input_ids, **kw: input_ids)
    assert len(seen) == 4


def test_an_assistant_does_not_run_its_strategy(seen: Seen) -> None:
    target, assistant = hf_hybrid.enable(llama()), hf_hybrid.enable(llama())
    assistant.generation_config.hf_hybrid = {"strategy": "block_diffusion"}
    plain = llama().generate(PROMPT, max_new_tokens=6, do_sample=False)
    out = target.generate(PROMPT, assistant_model=assistant, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, plain) and seen == []
    assistant.generate(PROMPT, max_new_tokens=2)
    assert len(seen) == 1  # on its own it does


def test_control_plan_and_tokenizer_are_bound(seen: Seen) -> None:
    model, tokenizer = hf_hybrid.enable(llama()), words()
    model.generate(PROMPT, strategy="autoregressive")
    assert seen[0]["call"].control is None and seen[0]["call"].plan is None
    control = hf_hybrid.prepare_vocabulary(model, tokenizer)
    plan = Plan((hf_hybrid.Span((3,), 8),))
    model.generate(PROMPT, strategy="planned_diffusion", plan=plan, tokenizer=tokenizer)
    assert seen[1]["call"].control == control and seen[1]["call"].plan == plan
    assert seen[1]["call"].tokenizer is tokenizer


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "sideways"}, SettingsError, "planned_diffusion"),
        ({"strategy": "autoregressive", "window_length": 4}, SettingsError, "choose from .*seed"),
        ({"strategy": "block_diffusion", "windw_length": 4}, SettingsError, "did you mean 'window_length'"),
        ({"strategy": "block_diffusion", "window_length": 0}, SettingsError, "1 to 1024"),
        ({"window_length": 4}, UnsupportedCallError, "window_length.*add strategy=.*block_diffusion"),
        ({"plan": Plan(())}, UnsupportedCallError, "plan.*add strategy="),
        ({"plan": Plan(()), "strategy": "autoregressive"}, UnsupportedCallError, "planned_diffusion"),
        ({"strategy": "autoregressive", "cache_implementation": "paged"}, UnsupportedCallError, "paged"),
        ({"strategy": "autoregressive", "stop_strings": ["w9"]}, UnsupportedCallError, "tokenizer="),
        ({"strategy": "autoregressive", "custom_generate": print}, UnsupportedCallError, "custom_generate"),
        ({"strategy": "autoregressive", "not_an_argument": 1}, ValueError, "not_an_argument"),
    ],
)
def test_refusals_name_the_fix(seen: Seen, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hf_hybrid.enable(llama()).generate(PROMPT, **arguments)
    assert seen == []


@pytest.mark.parametrize(
    ("name", "value"),
    {
        **{"num_beams": 2, "penalty_alpha": 0.6, "dola_layers": "high", "prompt_lookup_num_tokens": 3},
        **{"force_words_ids": [[3]], "constraints": [1], "use_mtp": True, "token_healing": True},
    }.items(),
)
def test_other_ways_of_decoding_are_refused(seen: Seen, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedCallError, match=f"{name}=.*leave out"):
        hf_hybrid.enable(llama()).generate(PROMPT, strategy="autoregressive", **{name: value})
    assert seen == []


def test_refusals_of_objects_and_of_configs(seen: Seen) -> None:
    model = hf_hybrid.enable(llama())
    with pytest.raises(UnsupportedCallError, match="assistant_model"):
        model.generate(PROMPT, strategy="autoregressive", assistant_model=llama())
    with pytest.raises(UnsupportedCallError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 32), strategy="block_diffusion")
    with pytest.raises(UnsupportedCallError, match="num_beams=3"):
        model.generate(PROMPT, GenerationConfig(num_beams=3), strategy="autoregressive")
    model.generation_config.num_beams = 3
    with pytest.raises(UnsupportedCallError, match="num_beams=3"):
        model.generate(PROMPT, strategy="autoregressive")
    assert seen == []
    model.generate(PROMPT, strategy="autoregressive", num_beams=1)  # the call undoes what is stored
    assert len(seen) == 1


def test_stop_strings_become_a_criterion(seen: Seen, host_log: pytest.LogCaptureFixture) -> None:
    model, tokenizer = hf_hybrid.enable(llama()), words()
    given = GenerationConfig(max_new_tokens=4, stop_strings=["w9"])
    model.generate(PROMPT, strategy="autoregressive", stop_strings="w9", tokenizer=tokenizer)
    model.generate(PROMPT, given, strategy="autoregressive", tokenizer=tokenizer)
    model.generation_config.stop_strings = ["w9"]
    model.generate(PROMPT, strategy="autoregressive", tokenizer=tokenizer)
    for call in seen:
        (criterion,) = [c for c in call["stopping_criteria"] if isinstance(c, StopStringCriteria)]
        # The criterion, not merely its type: it fires on the stop word and on nothing else.
        fires = [bool(criterion(torch.tensor([[3, i]]), None).all()) for i in (8, 9)]  # type: ignore[arg-type]
        assert fires == [False, True]
    assert given.stop_strings == ["w9"] and model.generation_config.stop_strings == ["w9"]  # callers keep theirs
    assert "deprecated" not in host_log.text


def test_streamer_gets_the_prompt_once_and_reaches_the_loop(seen: Seen) -> None:
    puts: list[Any] = []
    streamer = types.SimpleNamespace(put=lambda ids: puts.append(ids.flatten().tolist()), end=lambda: puts.append(0))
    hf_hybrid.enable(llama()).generate(PROMPT, strategy="autoregressive", streamer=streamer)
    assert seen[0]["call"].streamer is streamer and puts == [[3, 4, 5], [NEW], 0]  # 0: the end


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_giant_length_allocates_nothing(seen: Seen, cache: str | None) -> None:
    model = hf_hybrid.enable(llama())
    model.generate(PROMPT, strategy="autoregressive", max_new_tokens=10**9, cache_implementation=cache)
    assert seen[0]["generation_config"].max_length == 10**9 + 3
    # A static cache that the host made here would set the size of all later ones.
    assert getattr(model, "_previous_max_cache_length", -1) < 0
    model.generate(PROMPT, max_new_tokens=2, do_sample=False, cache_implementation="static")


def test_enable_and_disable() -> None:
    model = llama()
    assert hf_hybrid.enable(model) is model and hf_hybrid.enable(model) is model
    assert isinstance(model, LlamaForCausalLM) and isinstance(model, HybridGenerationMixin)
    assert not model.generation_config._from_model_config  # also for whoever saves the config alone
    assert type(model) is type(hf_hybrid.enable(llama()))  # made once per host class
    assert type(model).__name__ == "LlamaForCausalLM" and "Hybrid" in type(model).__qualname__
    assert hf_hybrid.disable(hf_hybrid.disable(model)) is model and type(model) is LlamaForCausalLM

    class Own(HybridGenerationMixin, LlamaForCausalLM):
        """A user's class with the mixin written down."""

    assert type(hf_hybrid.disable(hf_hybrid.enable(Own(llama().config)))) is Own


def test_enable_refuses_what_cannot_generate() -> None:
    with pytest.raises(TypeError, match="AutoModelForCausalLM"):
        hf_hybrid.enable(llama().model)
    with pytest.raises(TypeError, match="AutoModelForCausalLM"):
        hf_hybrid.enable(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="decoder-only"):
        hf_hybrid.enable(encoder_decoder())


def test_enable_reaches_through_peft() -> None:
    inner = llama()
    wrapper = types.SimpleNamespace(get_base_model=lambda: inner)
    assert hf_hybrid.enable(wrapper) is wrapper and isinstance(inner, HybridGenerationMixin)
    assert hf_hybrid.disable(wrapper) is wrapper and type(inner) is LlamaForCausalLM


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_enabled_and_apart(seen: Seen, copier: Callable[[Any], Any]) -> None:
    model = hf_hybrid.enable(llama())
    twin = copier(model)
    assert type(twin) is type(model) and torch.equal(twin(PROMPT).logits, model(PROMPT).logits)
    twin.generate(PROMPT, strategy="autoregressive")
    assert seen[0]["model"] is twin
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().sum() > 0


def test_pickle_and_torch_save_in_a_new_process(tmp_path: Path) -> None:
    model = hf_hybrid.enable(llama())
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "sum").write_text(repr(model(PROMPT).logits.sum().item()))
    code = (
        "import pickle, sys, pathlib, torch; p = pathlib.Path(sys.argv[1])\n"
        "want = float((p / 'sum').read_text())\n"
        "for m in (pickle.loads((p / 'model.pickle').read_bytes()), torch.load(p / 'model.pt', weights_only=False)):\n"
        "    got = m(torch.tensor([[3, 4, 5]])).logits.sum().item()\n"
        "    from hf_hybrid import HybridGenerationMixin\n"
        # The same weights in the same library: only thread counts may reorder the sums of 183 float64 numbers.
        "    assert isinstance(m, HybridGenerationMixin) and abs(got - want) < 1e-9, (type(m), got, want)\n"
        "print('both loaded')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "both loaded", done.stderr


@pytest.mark.parametrize("late", [False, True])
def test_settings_survive_save_and_load(seen: Seen, tmp_path: Path, late: bool) -> None:
    model, tokenizer = hf_hybrid.enable(llama(tie_word_embeddings=True)), words()
    if late:  # a config assigned after enable(): the flag is back, and only the hook in save_pretrained sees it
        model.generation_config = GenerationConfig.from_model_config(model.config)
        assert model.generation_config._from_model_config
    tokens = hf_hybrid.prepare_vocabulary(model, tokenizer)
    stored = {"strategy": "block_diffusion", "window_length": 4, "planned_diffusion": {"commit": "block"}}
    model.generation_config.hf_hybrid = stored
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["hf_hybrid"]["par"] == tokens.tags.par
    assert json.loads((tmp_path / "generation_config.json").read_text())["hf_hybrid"] == stored

    loaded = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridGenerationMixin) and loaded.generation_config.hf_hybrid == stored
    assert hf_hybrid.control_tokens(loaded) == tokens
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)
    loaded.generate(PROMPT, max_new_tokens=2)
    assert seen[0]["call"].settings.window_length == 4 and seen[0]["call"].control.noise.mask == tokens.noise.mask


def test_auto_class(tmp_path: Path) -> None:
    model = hf_hybrid.AutoHybridModelForCausalLM.from_config(llama().config)
    assert isinstance(model, HybridGenerationMixin) and isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    loaded, info = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, HybridGenerationMixin) and not info["missing_keys"]
    with pytest.raises(TypeError, match="from_pretrained"):
        hf_hybrid.AutoHybridModelForCausalLM()


@pytest.mark.parametrize("ours", [True, False])
def test_generate_of_a_repository(seen: Seen, tmp_path: Path, ours: bool) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "custom_generate").mkdir()
    source = "def generate(inputs=None, *, model, **kwargs):\n    return 'the repository'\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(("HF_HYBRID = True\n" if ours else "") + source)
    if ours:
        loaded = hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        assert loaded.generate(PROMPT, strategy="autoregressive").tolist() == [[3, 4, 5, NEW]] and len(seen) == 1
    else:
        with pytest.raises(UnsupportedCallError, match="trust_remote_code=False"):
            hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        assert isinstance(hf_hybrid.AutoHybridModelForCausalLM.from_pretrained(tmp_path), HybridGenerationMixin)


def test_pipeline(seen: Seen, host_log: pytest.LogCaptureFixture) -> None:
    model = hf_hybrid.enable(llama())
    model.generation_config.max_new_tokens = None
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=words(), device="cpu")
    assert "not supported" not in host_log.text
    arguments = {"strategy": "block_diffusion", "window_length": 4}
    assert pipe("w3 w4", **arguments) == [{"generated_text": "w3 w4w7"}]
    assert seen[0]["call"].settings.window_length == 4
    # The pipeline's own defaults arrive, since neither call nor model sets them.
    config = seen[0]["generation_config"]
    assert config.do_sample is True and config.temperature == 0.7 and config.max_new_tokens == 256
    chat = pipe([{"role": "user", "content": "w5"}], do_sample=False, **arguments)
    assert chat[0]["generated_text"][-1] == {"role": "assistant", "content": "w7"}
    assert seen[1]["generation_config"].do_sample is False
    batch = pipe(["w3", "w4 w5 w6"], batch_size=2, **arguments)
    assert [b[0]["generated_text"] for b in batch] == ["w3w7", "w4 w5 w6w7"]
    assert seen[2]["input_ids"].tolist() == [[2, 2, 3], [4, 5, 6]]
    assert seen[2]["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    # A ModelOutput of the loop is read as well.
    assert pipe("w3", stop_sequence="w7", return_dict_in_generate=True, **arguments) == [{"generated_text": "w3w7"}]
    # The pipeline of 5.15 takes the stop sequence as an end token and keeps the tokenizer.
    assert seen[3]["call"].tokenizer in (None, pipe.tokenizer)


def test_install_and_uninstall(seen: Seen) -> None:
    original = GenerationMixin.generate
    hf_hybrid.install()
    hf_hybrid.install()
    try:
        model = llama()
        assert model.generate(PROMPT, strategy="autoregressive").tolist() == [[3, 4, 5, NEW]]
        model.generate(PROMPT, GenerationConfig(hf_hybrid={"strategy": "block_diffusion"}))  # positional, as serve does
        assert [c["call"].strategy for c in seen] == ["autoregressive", "block_diffusion"]
        plain = model.generate(PROMPT, max_new_tokens=4, do_sample=False)
        enabled = hf_hybrid.enable(llama())
        assert torch.equal(enabled.generate(PROMPT, max_new_tokens=4, do_sample=False), plain)
        enabled.generate(PROMPT, strategy="autoregressive")
        assert len(seen) == 3  # once, although both ways are open
    finally:
        hf_hybrid.uninstall()
    assert GenerationMixin.generate is original
    hf_hybrid.uninstall()
    assert torch.equal(llama().generate(PROMPT, max_new_tokens=4, do_sample=False), plain)
    with pytest.raises(ValueError, match="strategy"):
        llama().generate(PROMPT, strategy="autoregressive")


def test_install_and_what_it_does_not_fit(monkeypatch: pytest.MonkeyPatch, installed: None) -> None:
    with pytest.raises(UnsupportedCallError, match="encoder-decoder"):
        encoder_decoder().generate(PROMPT, strategy="autoregressive")
    with monkeypatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", lambda *a, **k: None)
        with pytest.raises(RuntimeError, match="replaced"):
            hf_hybrid.uninstall()
