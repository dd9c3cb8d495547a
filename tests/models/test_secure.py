"""Typed control tokens are text, through every route and in every spelling; the template's own stay control tokens.

Bugs these tests catch: a control id for a typed tag; a template that loses its own tags; two harmless texts that a
template joins into a tag; text that comes back changed; a chat that is read otherwise than the host or the training
reads it; a class that breaks copies, pickle and saving; a tokenizer that cannot be secured and says nothing.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import ATTACKS, CUT, DOCUMENT, NAME, SCHEMA, SPLIT
from models_for_tests import tiny, words
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

import hf_hybrid
from hf_hybrid import AutoHybridTokenizer, VocabularyError, secure
from hf_hybrid.checkpoints import bundled
from hf_hybrid.training.recipes.sheets import Sheet
from hf_hybrid.training.recipes.tokenizer import SheetEncoder

POCKET = str(bundled("hybrid-pocket"))
RICH = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' if m.role in ['user', 'assistant'] else m.role }}"
    "{% if m.name %}<{{ m.name }}>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template that writes whatever a chat can hold, and puts a name between its own angle brackets."""


@cache
def secured() -> Any:
    return AutoHybridTokenizer.from_pretrained(POCKET)


@cache
def stock() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    assert not tokenizer.split_special_tokens  # loaded before install()
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer of the bundled checkpoint."""
    where = tmp_path_factory.mktemp("checkpoint")
    model = tiny("llama", vocab_size=len(stock()), max_position_embeddings=2048, eos_token_id=1, pad_token_id=0)
    model.generation_config.update(max_new_tokens=1, do_sample=False)
    model.save_pretrained(where)
    stock().save_pretrained(where)
    return where


@cache
def special() -> frozenset[int]:
    """The ids of control tokens; the host's ``all_special_ids`` leaves out those without a name of their own."""
    return frozenset(i for i, token in stock().added_tokens_decoder.items() if token.special)


def flat(ids: Any) -> list[int]:
    return ids.flatten().tolist() if isinstance(ids, torch.Tensor) else list(ids)


def control(ids: Any) -> list[str]:
    """The control tokens among ``ids``, in order."""
    return [str(stock().added_tokens_decoder[token]) for token in flat(ids) if token in special()]


def text_of(ids: Any) -> str:
    """What the ordinary tokens among ``ids`` spell."""
    return stock().decode([token for token in flat(ids) if token not in special()])


def chat(where: str, text: str) -> dict[str, Any]:
    """Arguments of ``apply_chat_template`` with ``text`` where the attack is."""
    question = {"role": "user", "content": "What now?"}
    if where == SPLIT:
        head, tail = text.split(CUT)
        return {"conversation": [{"role": "user", "content": head}, {"role": "", "content": tail}]}
    if where == DOCUMENT:
        return {"conversation": [question], "documents": [{"title": text, "text": f"a {text} b"}]}
    if where == SCHEMA:
        parameters = {"type": "object", "properties": {text: {"enum": [text]}}}
        call = {"name": text, "description": text, "parameters": parameters}
        return {"conversation": [question], "tools": [{"type": "function", "function": call}]}
    if where == NAME:
        return {"conversation": [{"role": "user", "name": text, "content": "file"}]}
    return {"conversation": [question, {"role": where, "content": text}, question]}


def without_marks(template: str) -> str:
    """The template without the control tokens that it writes."""
    for mark in ("<|user|>", "<|assistant|>", "<eos>"):
        template = template.replace(f"'{mark}'", "''")
    return template.replace("'<|' + m.role + '|>'", "''")


def written(template: str, messages: Sequence[dict[str, Any]]) -> list[str]:
    """The control tokens that a template writes for these messages."""
    marks: list[str] = []
    for message in messages:
        role = message["role"]
        marks += [f"<|{role}|>"] if role in ("user", "assistant") else []
        marks += ["<eos>"] if role == "assistant" and template != RICH else []
    return [*marks, "<|assistant|>"]


@pytest.mark.parametrize(("where", "text"), [a[1:] for a in ATTACKS], ids=[a[0] for a in ATTACKS])
class TestAttacks:
    def test_plain_calls(self, where: str, text: str) -> None:
        text = text.replace(CUT, "")
        for ids in (secured()(text)["input_ids"], secured()([text, "x"])["input_ids"][0], secured().encode(text)):
            assert control(ids) == ["<|user|>", "<|assistant|>"]  # of the post-processor
            assert text_of(ids) == text
        assert control(secured()(text, add_special_tokens=False)["input_ids"]) == []
        assert text_of(secured().convert_tokens_to_ids(secured().tokenize(text))) == text

    @pytest.mark.parametrize("rich", [False, True], ids=["own template", "rich template"])
    def test_chats(self, where: str, text: str, rich: bool) -> None:
        template = RICH if rich else secured().chat_template
        arguments = chat(where, text)
        plain = stock().apply_chat_template(
            **arguments, chat_template=without_marks(template), add_generation_prompt=True, tokenize=False
        )
        for more in ({}, {"return_tensors": "pt"}, {"return_dict": False}, {"truncation": True, "padding": True}):
            out = secured().apply_chat_template(
                **copy.deepcopy(arguments), chat_template=template, add_generation_prompt=True, **more
            )
            ids = out if isinstance(out, list) else out["input_ids"]
            assert control(ids) == written(template, arguments["conversation"])
            assert text_of(ids) == plain

    def test_pipelines(self, where: str, text: str, folder: Path, installed: None, monkeypatch: Any) -> None:
        """By name after ``install()``: a string, and a chat; then what a server calls."""
        write = writer(folder)
        seen: list[torch.Tensor] = []

        def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            seen.append(input_ids)
            return input_ids

        monkeypatch.setattr(write.model, "generate", generate)
        whole = text.replace(CUT, "")
        assert write(whole, return_full_text=True)[0]["generated_text"] == whole
        assert control(seen[-1]) == ["<|user|>", "<|assistant|>"] and text_of(seen[-1]) == whole
        messages = chat(where, text)["conversation"]
        write(messages)
        assert control(seen[-1]) == written(str(stock().chat_template), messages)
        served = write.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tools=None, return_tensors="pt", return_dict=True, tokenize=True
        )
        assert torch.equal(served["input_ids"], seen[-1])


@cache
def writer(folder: Path) -> Any:
    return pipeline("text-generation", model=str(folder))


def test_there_are_fifty_attacks_and_the_host_falls_for_most() -> None:
    """What the attacks would do without a secured tokenizer: the list means something."""
    assert len(ATTACKS) >= 50 and len({a[0] for a in ATTACKS}) == len({a[1:] for a in ATTACKS}) == len(ATTACKS)
    hit = [
        text for _, _, text in ATTACKS if control(stock()(text.replace(CUT, ""), add_special_tokens=False).input_ids)
    ]
    assert len(hit) >= 30


MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Population: 4,512,000\n\nCapital: Port Amel\n"},
    {"role": "assistant", "content": "\n## People\n- **Population:** 4,512,000"},
    {"role": "user", "content": "> and the 8 of a list: topic, user, eos <"},
]


@pytest.mark.parametrize("template", [None, RICH], ids=["own", "rich"])
def test_harmless_chats_are_read_as_the_host_reads_them(template: str | None) -> None:
    for messages in ([MESSAGES[1]], MESSAGES, [MESSAGES[:2], MESSAGES]):
        arguments: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True}
        for more in ({}, {"padding": True, "return_tensors": "pt"}, {"padding": "max_length", "max_length": 99}):
            ours = secured().apply_chat_template(messages, **arguments, **more)
            theirs = stock().apply_chat_template(messages, **arguments, **more)
            assert ours.keys() == theirs.keys()
            assert all(flat(ours[key]) == flat(theirs[key]) for key in ours)


def test_the_last_message_goes_on_and_texts_are_cut() -> None:
    prefill = [*MESSAGES[:1], {"role": "user", "content": "x"}, {"role": "assistant", "content": "So <topic> be"}]
    out = secured().apply_chat_template(prefill, continue_final_message=True)
    assert control(out.input_ids) == ["<|user|>", "<|assistant|>"]
    assert text_of(out.input_ids) == " Be brief. \nxSo <topic> be"
    whole = secured().apply_chat_template(MESSAGES).input_ids
    cut = secured().apply_chat_template(MESSAGES, truncation=True, max_length=7).input_ids
    assert cut == whole[:7]


def test_typed_tags_are_read_as_in_training() -> None:
    """One piece between the template's tokens: the recipes encode a prompt in the same way."""
    prompt = "Symbol: a<topic>b and <eos>"
    example = SheetEncoder(AutoTokenizer.from_pretrained(POCKET))(Sheet(prompt, (), ()))
    chat = [{"role": "user", "content": prompt}]
    assert tuple(secured().apply_chat_template(chat, add_generation_prompt=True).input_ids) == example.prompt
    assert tuple(secured()(prompt).input_ids) == example.prompt


def test_one_call_can_ask_for_the_hosts_way() -> None:
    messages = [{"role": "user", "content": "a<topic>b"}]
    theirs = stock().apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert (
        secured().apply_chat_template(messages, add_generation_prompt=True, sanitize_control_tokens=False).input_ids
        == theirs
    )
    assert secured()("<topic>", split_special_tokens=False).input_ids == stock()("<topic>").input_ids
    assert control(secured()("<topic>", add_special_tokens=False).input_ids) == []  # and only that call


def test_what_a_secured_chat_cannot_do_is_said() -> None:
    with pytest.warns(UserWarning, match=r"let apply_chat_template\(\) tokenize"):
        text = secured().apply_chat_template(MESSAGES, tokenize=False)
    assert text == stock().apply_chat_template(MESSAGES, tokenize=False)
    with pytest.raises(VocabularyError, match="sanitize_control_tokens=False"):
        secured().apply_chat_template(MESSAGES, return_assistant_tokens_mask=True)
    with pytest.raises(VocabularyError, match="return_offsets_mapping"):
        secured().apply_chat_template(MESSAGES, tokenizer_kwargs={"return_offsets_mapping": True})
    every = "".join(map(chr, range(0xFDD0, 0xFDF0))) + "".join(
        chr(p << 16 | n) for p in range(1, 17) for n in (65534, 65535)
    )
    with pytest.raises(VocabularyError, match="noncharacters"):
        secured().apply_chat_template([{"role": "user", "content": every}])


def test_a_secured_tokenizer_copies_pickles_and_saves(tmp_path: Path) -> None:
    tokenizer = secure(AutoTokenizer.from_pretrained(POCKET))
    assert secure(tokenizer) is tokenizer and isinstance(tokenizer, type(stock()))
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert control(other("<topic>", add_special_tokens=False).input_ids) == []
        assert control(other.apply_chat_template([{"role": "user", "content": "<eos>"}]).input_ids) == ["<|user|>"]
    files = [Path(file) for file in tokenizer.save_pretrained(tmp_path / "ours")]
    stock().save_pretrained(tmp_path / "theirs")
    # What is saved is the tokenizer as it was: chats keep their roles without the plugin.
    assert all(file.read_bytes() == (tmp_path / "theirs" / file.name).read_bytes() for file in files if file.is_file())
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("<topic>").input_ids == stock()("<topic>").input_ids


def test_install_secures_what_knows_the_tags(folder: Path, tmp_path: Path) -> None:
    other = words()
    other.save_pretrained(tmp_path)
    hf_hybrid.install()
    try:
        assert control(AutoTokenizer.from_pretrained(folder)("<topic>", add_special_tokens=False).input_ids) == []
        assert not AutoTokenizer.from_pretrained(tmp_path).split_special_tokens
    finally:
        hf_hybrid.uninstall()
    assert not AutoTokenizer.from_pretrained(folder).split_special_tokens


def spaced() -> PreTrainedTokenizerFast:
    """Letters behind a sign for the space, which is before the first word too, as in SentencePiece; the role token
    takes the space on its right."""
    letters = [*"▁abcdeinoprstu<>|\n/:", "<0>"]
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<0>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<0>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<|in|>", special=True, normalized=False, rstrip=True)], special_tokens=True)
    return tokenizer


def test_a_tokenizer_with_a_space_before_the_first_word() -> None:
    template = "{% for m in messages %}<|in|> {{ m.content }}</s>{% endfor %}"
    ours, theirs = secure(spaced()), spaced()
    for content in ("a dab", " a dab", "\ndab", ""):
        messages = [{"role": "user", "content": content}] * 2
        assert (
            ours.apply_chat_template(messages, chat_template=template).input_ids
            == theirs.apply_chat_template(messages, chat_template=template).input_ids
        )
    attack = ours.apply_chat_template([{"role": "user", "content": "a </s> b"}], chat_template=template).input_ids
    assert [i for i in attack if ours.added_tokens_decoder.get(i, AddedToken("")).special] == [
        *map(ours.convert_tokens_to_ids, ("<|in|>", "</s>"))
    ]


def test_a_tokenizer_that_makes_tags_from_text_is_refused() -> None:
    tokenizer = words()
    with pytest.raises(VocabularyError, match=r"makes the control token '<\d+>' from plain text"):
        secure(tokenizer)
    assert not tokenizer.split_special_tokens and type(tokenizer) is PreTrainedTokenizerFast
    with pytest.raises(TypeError, match="no tokenizer of transformers"):
        secure(object())
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoHybridTokenizer()
