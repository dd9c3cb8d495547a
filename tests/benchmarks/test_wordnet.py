"""Dictionary entries, on a made-up dictionary in the files' own format.

Catches: a line of the data that is read wrongly (numbers of senses, the word above, markers behind adjectives), a
held-out word or its definition in the training data, a closing line that counts wrongly, parts that do not say what
they read, sheets that are longer than a batch, and a split that uses a word twice.
"""

from __future__ import annotations

import io
import random
import re
import tarfile
from pathlib import Path

import pytest

from benchmarks.data import wordnet
from benchmarks.data.wordnet import CHAINED, SIZES, EntrySampler, Sense, make_sheet
from hf_hybrid.training.recipes.sheets import Sheet, exact_match, read_test_set, score_fields, write_items
from hf_hybrid.training.recipes.tokenizer import SheetEncoder, build_tokenizer, token_counter

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"


def make_tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in ("index.sense", *files):
            raw = (LICENCE + files.get(name, "x\n")).encode()
            member = tarfile.TarInfo(f"package/dict/{name}")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


FILES = {
    "data.noun": (
        '00000010 03 n 02 money_box 0 Coin_bank 1 001 @ 00000020 n 0000 | a box for coins; "the box was empty"\n'
        "00000020 03 n 01 container 0 000 | something that holds things  \n"
        "00000030 17 n 01 bank 0 002 ~ 00000010 n 0000 @i 00000020 n 0000 | land beside water; for walking; "
        '"they sat on the bank"; "a steep bank of sand"; "short"\n'
        "00000040 14 n 01 bank 1 000 | x  \n"
    ),
    "data.verb": "00000010 40 v 02 bank 2 deposit 0 000 01 + 08 00 | put into an account  \n",
    "data.adj": "00000010 00 s 02 galore(ip) 0 steep 0 001 & 00000010 a 0000 | existing in abundance  \n",
    "data.adv": "00000010 02 r 01 steep 0 000 | in a steep way or so  \n",
    "index.noun": (
        "bank n 3 2 @ ~ 3 1 00000040 00000030 00000010  \ncontainer n 1 0 1 1 00000020  \n"
        "coin_bank n 1 1 @ 1 0 00000010  \nmoney_box n 1 1 @ 1 0 00000010  \n"
    ),
    "index.verb": "bank v 1 0 1 1 00000010  \n",
    "index.adj": "galore a 1 1 & 1 0 00000010  \nsteep a 1 1 & 1 0 00000010  \n",
    "index.adv": "steep r 1 0 1 0 00000010  \n",
}


def test_load(tmp_path: Path) -> None:
    lexicon = wordnet.load(make_tarball(tmp_path / "w.tgz", FILES))
    # One sense alone is no entry; "x" is no definition, and sense 3 lists another word.
    assert set(lexicon) == {"bank", "steep"}
    noun, verb = lexicon["bank"]
    examples = ("they sat on the bank", "a steep bank of sand")
    assert noun == Sense("bank", "noun", 2, "noun00000030", "land beside water; for walking", (), "container", examples)
    assert (
        verb.name == "bank, verb 1"
        and verb.also == ("deposit",)
        and verb.text == ("put into an account\nAlso: deposit\n")
    )
    assert noun.text == (
        'land beside water; for walking\nKind of: container\n- "they sat on the bank"\n- "a steep bank of sand"\n'
    )
    assert [sense.also for sense in lexicon["steep"]] == [("galore",), ()]


def test_a_tarball_without_a_file_is_refused(tmp_path: Path) -> None:
    path = make_tarball(tmp_path / "w.tgz", {k: v for k, v in FILES.items() if k != "index.adv"})
    with pytest.raises(RuntimeError, match=r"has no package/dict/index\.adv: delete it"):
        wordnet.load(path)


def test_fetch_checks_the_hash(tmp_path: Path) -> None:
    (tmp_path / wordnet.TARBALL).write_bytes(b"no tarball")
    with pytest.raises(RuntimeError, match="sha256"):
        wordnet.fetch(tmp_path)


@pytest.fixture(scope="module")
def lexicon() -> dict[str, tuple[Sense, ...]]:
    """Words of two to five senses; every tenth one shares its first synset with the next word."""
    rng = random.Random(0)
    words: dict[str, tuple[Sense, ...]] = {}
    for n in range(3000):
        word = "".join(rng.choices("bcdfg", k=5)) + f"a{'e' * (n % 3)}" + "".join(rng.choices("klmn", k=3))
        senses = []
        for number in range(1, 2 + rng.randint(1, 4)):
            text = " ".join(rng.choices(["land", "sea", "of", "the", "tall", "grass"], k=rng.randint(3, 12)))
            synset = f"{n + (n % 10 == 0) if number == 1 else n}/{number}"
            examples = ("an example of it",) * rng.randint(0, 2)
            senses.append(Sense(word, rng.choice(["noun", "verb"]), number, synset, text, (), "", examples))
        words[word] = tuple(senses)
    return words


def test_held_out_words_and_senses_are_never_trained_on(lexicon: dict[str, tuple[Sense, ...]]) -> None:
    training = wordnet.training_lexicon(lexicon)
    held = set(lexicon) - set(training)
    assert len(held) >= 2100
    hidden = {sense.synset for word in held for sense in lexicon[word]}
    assert not hidden & {sense.synset for senses in training.values() for sense in senses}
    shortened = [word for word, senses in training.items() if len(senses) < len(lexicon[word])]
    assert shortened  # a sense that is shared with a held-out word went, the word stayed


def test_sheets(lexicon: dict[str, tuple[Sense, ...]]) -> None:
    sampler = EntrySampler(lexicon, seed=3)
    forms, sizes = set(), set()
    for index in range(300):
        sheet = sampler.draw(index)
        assert sheet == EntrySampler(lexicon, seed=3).draw(index) and sheet.open
        head, *names = sheet.prompt.split("\n")
        assert [part.label for part in sheet.parts] == [f"## {name[2:]}\n" for name in names]
        assert len(set(names)) == len(names)
        forms.add(head)
        sizes.add(len(names))
        counts = [part.text.count('- "') for part in sheet.parts]
        closing = sheet.pieces[1:]
        if head == wordnet.HEADS["closing"]:
            assert isinstance(closing[0], str)
            assert closing[0].startswith(f"In all: {len(names)} senses, {sum(counts)} examples; longest: ")
            longest = closing[0].partition("longest: ")[2].strip()
            assert next(len(p.text) for p in sheet.parts if longest in p.label) == max(len(p.text) for p in sheet.parts)
        else:
            assert closing == ()
        if head == wordnet.HEADS["chained"]:
            assert [part.depends for part in sheet.parts] == [(), *((n,) for n in range(len(names) - 1))]
            for number, part in enumerate(sheet.parts):
                assert part.text.endswith(f"Examples so far: {sum(counts[: number + 1])}\n")
            assert len(names) <= CHAINED
        else:
            assert not any(part.depends for part in sheet.parts)
        assert exact_match(sheet, sheet.answer.replace("land", "sea"))
        assert score_fields(sheet, "".join(part.label for part in sheet.parts[1:])) == (len(names) - 1, len(names))
    assert forms == set(wordnet.HEADS.values()) and {2, 24} <= sizes


def test_sheets_that_are_too_long_lose_parts(lexicon: dict[str, tuple[Sense, ...]]) -> None:
    def fits(sheet: Sheet) -> bool:
        return len(sheet.answer) < 500

    sampler, free = EntrySampler(lexicon, 0, fits), EntrySampler(lexicon, 0)
    for index in range(40):
        sheet, whole = sampler.draw(index), free.draw(index)
        assert fits(sheet) and whole.prompt.startswith(sheet.prompt)
        assert fits(whole) == (sheet == whole)
    with pytest.raises(ValueError, match="raise num_rows"):
        EntrySampler(lexicon, 0, lambda _: False).draw(0)


def test_made_up_words_name_real_senses(lexicon: dict[str, tuple[Sense, ...]]) -> None:
    plain, coined = EntrySampler(lexicon, seed=3), EntrySampler(lexicon, seed=3, coined=0.5)
    made_up = known = 0
    for index in range(100):
        sheet = coined.draw(index)
        names = [line[2:] for line in sheet.prompt.split("\n")[1:]]
        assert [part.label for part in sheet.parts] == [f"## {name}\n" for name in names]
        assert len(set(names)) == len(names)
        words = {name.rpartition(",")[0] for name in names}
        assert all(re.fullmatch(r"[a-z][a-z' -]{0,19}", word) for word in words)
        made_up, known = made_up + len(words - set(lexicon)), known + len(words & set(lexicon))
        assert sheet == EntrySampler(lexicon, seed=3, coined=0.5).draw(index)
        real = {name[2:].rpartition(",")[0] for name in plain.draw(index).prompt.split("\n")[1:]}
        assert real <= set(lexicon)  # nothing is made up unasked
    assert 0.3 < made_up / (made_up + known) < 0.6  # half are renamed, and some names exist


def test_held_out_prompts(lexicon: dict[str, tuple[Sense, ...]], tmp_path: Path) -> None:
    training = wordnet.training_lexicon(lexicon)
    path = tmp_path / "test.jsonl"
    assert write_items(path, wordnet.held_out_items(lexicon, lambda _: True)) == 192
    items = read_test_set(path)
    words = [{part.label.split(",")[0][3:] for part in item.sheet.parts} for item in items]
    assert len(set().union(*words)) == sum(map(len, words))  # no word in two prompts
    assert not set().union(*words) & set(training)
    test = [item for item in items if item.split == "test"]
    plain = [item for item in test if "plain" in item.id]
    assert len(test) == 144 and len(plain) == 96
    assert sorted({len(item.sheet.parts) for item in plain}) == list(SIZES)
    assert all(item.sheet.open and item.kind == "groups" for item in items)
    assert sum("closing" in item.id for item in test) == sum("chained" in item.id for item in test) == 24


def test_headings_are_short_in_tokens(lexicon: dict[str, tuple[Sense, ...]]) -> None:
    sampler = EntrySampler(lexicon, 0)
    tokenizer = build_tokenizer(wordnet.training_texts(sampler, 40), wordnet.UNITS, 800)
    count, encode = token_counter(tokenizer), SheetEncoder(tokenizer)
    assert all(count(unit) == 1 for unit in wordnet.UNITS)
    for index in range(20):
        sheet = sampler.draw(index)
        example = encode(sheet)
        assert tokenizer.decode(example.answer) == sheet.answer
        # A name is the same tokens in the prompt and in the label, so that it can be copied.
        prompt = tokenizer(sheet.prompt, add_special_tokens=False).input_ids
        for part in example.rounds[0]:
            name = list(part.label[1:-1])
            assert any(prompt[at : at + len(name)] == name for at in range(len(prompt)))
    sense = next(iter(lexicon.values()))[0]
    assert make_sheet([sense, sense], "plain").prompt == f"Define:\n- {sense.name}\n- {sense.name}"
