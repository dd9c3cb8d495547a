"""Tasks that a recipe trains on. Each makes a tokenizer, a stream of examples, and held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_hybrid.training.collators import CollatorSettings
from hf_hybrid.training.examples import Example
from hf_hybrid.training.inputs import digest
from hf_hybrid.training.recipes import json_lines
from hf_hybrid.training.recipes.json_lines import JsonLinesData, ShuffledEpochs
from hf_hybrid.training.recipes.sheets import Sheet, write_items
from hf_hybrid.training.recipes.tokenizer import SheetEncoder, build_tokenizer


class TaskError(ValueError):
    """Data that cannot be trained on; the message says what is missing."""


@dataclass(frozen=True)
class Task:
    """Data of a task.

    Attributes:
        tokenizer: of the model. draw: gives the example of an index, from the index alone.
        write_test_set: writes the held-out prompts to a path; their number.
        report: a summary of the data, in lines of text. sample: one annotated sheet to look at.
        content: a digest of the data (``hf_hybrid.training.inputs``); a run can be resumed with the same data
            alone.
    """

    tokenizer: PreTrainedTokenizerBase
    draw: Callable[[int], Example]
    write_test_set: Callable[[Path], int]
    report: tuple[str, ...] = ()
    sample: Sheet | None = None
    content: str = ""


@dataclass(frozen=True)
class Source:
    """What a task is made from.

    Attributes:
        cache_dir: where fetched data is kept. seed: of the stream and the split. data: the recipe's ``data`` section,
            checked. batches: the examples must fit into their rows and spans. positions: of the model.
        tokenizer: to be used as it is, a teacher's; None: one is trained on the data.
    """

    cache_dir: Path
    seed: int
    data: Any
    batches: CollatorSettings
    positions: int
    tokenizer: Any = None

    def make_tokenizer(self, *args: Any, **options: Any) -> Any:
        """The tokenizer that is given, or ``build_tokenizer`` of the arguments."""
        if self.tokenizer is not None:
            return self.tokenizer
        return build_tokenizer(*args, model_max_length=self.positions, **options)


def jsonl_task(source: Source) -> Task:
    """A file of prompts and answers (`hf_hybrid.training.recipes.json_lines`)."""
    data: JsonLinesData = source.data
    path = Path(data.jsonl)
    try:
        found = json_lines.collect(path, data)
    except OSError as error:
        raise TaskError(f"data: jsonl: {path} cannot be read ({error.strerror}); give the path of a file") from error
    training, _ = json_lines.split_samples(found.samples, data.held_out, source.seed)
    texts = (text for sample in training for text in (sample.sheet.prompt, sample.sheet.answer))
    tokenizer = source.make_tokenizer(texts, (), data.vocab_size, fewer=True)
    encode = SheetEncoder(tokenizer)
    fitting: list[json_lines.Sample] = []
    examples: dict[int, Example] = {}
    for sample in found.samples:
        example = encode(sample.sheet)
        if (kind := _too_large(example, source)) is not None:
            found.refuse(kind, sample.line)
        else:
            fitting.append(sample)
            examples[sample.line] = example
    found.samples = fitting
    training, held_out = json_lines.split_samples(fitting, data.held_out, source.seed)
    if len(training) < 2:
        raise TaskError(f"{path}: there are too few samples to train on; " + "; ".join(found.report()))
    items = json_lines.held_out_items(held_out)
    return Task(
        tokenizer,
        ShuffledEpochs([examples[sample.line] for sample in training], source.seed),
        lambda target: write_items(target, items),
        (*found.report(), f"{len(training)} to train on, {len(held_out)} held out; {len(tokenizer)} tokens"),
        next((sample.sheet for sample in training if sample.sheet.parts), None),
        digest((sample.sheet.prompt, sample.sheet.pieces) for sample in fitting),
    )


def _too_large(example: Example, source: Source) -> str | None:
    """Why an example fits into no batch; None: it does."""
    batches = source.batches
    if example.planned_rows > batches.num_rows:
        return f"needs more rows than batches: num_rows={batches.num_rows}"
    if example.planned_spans > batches.max_spans:
        return f"needs more spans than batches: max_spans={batches.max_spans}"
    return None


Maker = Callable[[Source], Task]

TASKS: Mapping[str, Maker] = {"jsonl": jsonl_task}
"""Task name -> maker of its data."""

DATA: dict[str, type] = {"jsonl": JsonLinesData}
"""Task name -> its settings in the recipe's ``data`` section, for the tasks that have some."""
