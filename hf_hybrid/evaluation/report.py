"""Numbers of a run: a result per candidate, the shape of the test set, and their published JSON."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hf_hybrid.config import settings_for
from hf_hybrid.evaluation.candidates import Candidate
from hf_hybrid.evaluation.harness import Measurement, Run, country_of
from hf_hybrid.evaluation.statistics import bootstrap_interval, median, paired_ratios
from hf_hybrid.models.processor import bfloat16_units
from hf_hybrid.training.recipes.sheets import TestItem

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Result:
    """One candidate over all prompts.

    Attributes:
        strategy: its name, ``host`` for the host's ``generate()``. name: of the candidate. settings: all of them, as
        they were in force. baseline: True: the ratios are to this one; every type of weights has its own.
        seconds_per_answer: median. speedup: median over prompts of the baseline's seconds divided by its own, where
        both answers are right; ``speedup_prompts`` is their number. speedup_all: the same over all prompts.
        tokens_per_second, tokens_per_forward: sums divided by sums. num_forwards, num_rows: mean of an answer.
        seconds_to_first_text: median. seconds_per_stage: mean. peak_memory_mb: largest, see ``harness``.
        field_exact_match: share of the lines. answer_exact_match: share of the answers.
        extended, cut, fallen_back: parts, in all answers.
        equal_to, equal_share: the candidate whose text it must reproduce, and on what share of the prompts it did.
        seam_nll, middle_nll: nats per token of the first 8 tokens behind a heading and of all others, read in
        autoregressive mode; None when not asked for.
        contradictions, restated: facts that a part states differently than an earlier one, of those that it states
        again, in all answers. dtype: of the weights, None: that of the run (``device``).
        Intervals are 95 %, over countries.
    """

    strategy: str
    name: str
    settings: Mapping[str, Any]
    baseline: bool
    seconds_per_answer: float | None
    speedup: float | None
    speedup_interval: Interval
    speedup_prompts: int
    speedup_all: float | None
    tokens_per_second: float
    tokens_per_forward: float
    num_forwards: float
    num_rows: float
    seconds_to_first_text: float | None
    seconds_per_stage: Mapping[str, float]
    peak_memory_mb: float | None
    field_exact_match: float
    answer_exact_match: float
    answer_exact_match_interval: Interval
    extended: int
    cut: int
    fallen_back: int
    equal_to: str | None
    equal_share: float | None
    seam_nll: float | None = None
    middle_nll: float | None = None
    contradictions: int = 0
    restated: int = 0
    dtype: str | None = None


def results_of(run: Run, stored: Mapping[str, Any] | None = None) -> list[Result]:
    """One result per candidate; empty when no prompt was finished.

    Args:
        stored: ``generation_config.hf_hybrid`` of the model, for the settings in force.
    """
    if not run.items:
        return []
    bases = {dtype: baseline_of(run, dtype) for dtype in dict.fromkeys(c.dtype for c in run.candidates)}
    return [_result(run, candidate, bases[candidate.dtype], stored) for candidate in run.candidates]


def baseline_of(run: Run, dtype: str | None = None) -> str:
    """Name of the baseline among the candidates of ``dtype``: the faster one (median seconds) of the host and our
    autoregression; the first candidate if there is neither."""
    own = [c for c in run.candidates if c.dtype == dtype]
    names = [c.name for c in own if c.strategy in (None, "autoregressive")] or [own[0].name]
    return min(names, key=lambda name: float(np.median([m.seconds for m in run.measurements[name]])))


def _result(run: Run, candidate: Candidate, base: str, stored: Mapping[str, Any] | None) -> Result:
    own, reference = run.measurements[candidate.name], run.measurements[base]
    countries = [country_of(item) for item in run.items]
    seconds, slow = [m.seconds for m in own], [m.seconds for m in reference]
    both = [m.right and r.right for m, r in zip(own, reference, strict=True)]
    right = paired_ratios(slow, seconds, countries, both)
    ratios = [ratio for group in right.values() for ratio in group]
    every = [ratio for group in paired_ratios(slow, seconds, countries).values() for ratio in group]
    exact: dict[str, list[float]] = {}
    for m in own:
        exact.setdefault(m.country, []).append(float(m.right))
    first = [m.seconds_to_first_text for m in own if m.seconds_to_first_text is not None]
    memory = [m.peak_memory_mb for m in own if m.peak_memory_mb is not None]
    tokens = sum(m.num_tokens for m in own)
    twin = run.measurements.get(candidate.equals or "")
    return Result(
        strategy=candidate.strategy or "host",
        name=candidate.name,
        settings=_settings(candidate, stored),
        baseline=candidate.name == base,
        seconds_per_answer=median(seconds),
        speedup=median(ratios),
        speedup_interval=bootstrap_interval(right, lambda values: float(np.median(values))),
        speedup_prompts=len(ratios),
        speedup_all=median(every),
        tokens_per_second=tokens / sum(seconds),
        tokens_per_forward=tokens / max(sum(m.num_forwards for m in own), 1),
        num_forwards=_mean([m.num_forwards for m in own]),
        num_rows=_mean([m.num_rows for m in own]),
        seconds_to_first_text=median(first),
        seconds_per_stage=_stages(own),
        peak_memory_mb=max(memory, default=None),
        field_exact_match=sum(m.fields_right for m in own) / max(sum(m.fields_total for m in own), 1),
        answer_exact_match=_mean([float(m.right) for m in own]),
        answer_exact_match_interval=bootstrap_interval(exact, lambda values: float(values.mean())),
        extended=sum(m.extended for m in own),
        cut=sum(m.cut for m in own),
        fallen_back=sum(m.fallen_back for m in own),
        equal_to=candidate.equals if twin is not None else None,
        equal_share=None if twin is None else _mean([float(m.text == t.text) for m, t in zip(own, twin, strict=True)]),
        contradictions=sum(m.contradictions for m in own),
        restated=sum(m.restated for m in own),
        dtype=candidate.dtype,
        **_coherence(own),
    )


def _settings(candidate: Candidate, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    if candidate.strategy is None:
        return {}
    return asdict(settings_for(candidate.strategy, candidate.settings, stored))


def _stages(own: Sequence[Measurement]) -> dict[str, float]:
    """Mean seconds per stage over all answers, one without the stage counting as zero."""
    names = dict.fromkeys(name for m in own for name in m.seconds_per_stage)
    return {name: _mean([m.seconds_per_stage.get(name, 0.0) for m in own]) for name in names}


def _coherence(own: Sequence[Measurement]) -> dict[str, float | None]:
    """Nats per token at the seams and elsewhere; None where no token was read."""
    read = [m.coherence for m in own if m.coherence is not None]
    sums = {
        "seam_nll": (sum(c.seam_nll for c in read), sum(c.seam_tokens for c in read)),
        "middle_nll": (sum(c.middle_nll for c in read), sum(c.middle_tokens for c in read)),
    }
    return {name: nats / tokens if tokens else None for name, (nats, tokens) in sums.items()}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def shape_of(items: Sequence[TestItem], tokenizer: Any) -> dict[str, Any]:
    """Medians over the sheets: prompt and answer tokens, parts, longest and mean part in tokens (headings left out),
    and the longest part divided by the mean one: what bounds the gain from writing parts at once."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts, answers, parts, longest, means, uneven = ([] for _ in range(6))
    for item in items:
        prompts.append(count(item.sheet.prompt))
        answers.append(count(item.sheet.answer))
        lengths = [count(part.text) for part in item.sheet.parts]
        parts.append(len(lengths))
        if lengths:
            longest.append(max(lengths))
            means.append(_mean(lengths))
            uneven.append(max(lengths) / max(_mean(lengths), 1e-9))
    return {
        "splits": sorted({item.split for item in items}),
        (items[0].kind if items else "groups"): len({country_of(item) for item in items}),
        "prompt_tokens": median(prompts),
        "answer_tokens": median(answers),
        "parts": median(parts),
        "longest_part": median(longest),
        "mean_part": median(means),
        "longest_to_mean_part": median(uneven),
    }


def environment(model: Any) -> dict[str, Any]:
    """``commit``, ``versions`` and ``device``, as they go into the JSON."""
    from hf_hybrid import __version__

    device: torch.device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "commit": _commit(Path(__file__).resolve().parents[1] / "__init__.py"),
        "versions": {
            "hf_hybrid": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": {
            "type": device.type,
            "processor": name,
            "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "bfloat16_units": (bfloat16_units() or []) if device.type == "cpu" else None,
        },
    }


def to_json(
    run: Run, results: Sequence[Result], shape: Mapping[str, Any], environment: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """The published form of a run; every number in a model card comes from such a file."""
    return {
        "command": command,
        **environment,
        "num_prompts": len(run.items),
        "batch_size": run.batch_size,
        "temperature": run.temperature,
        "shape": dict(shape),
        "groups": groups_of(run),
        "kinds": kinds_of(run),
        "results": [asdict(result) for result in results],
    }


def groups_of(run: Run) -> list[dict[str, Any]]:
    """Results by the number of parts that read other parts: where they are many, writing parts at once gains little.

    The baselines are those of the whole run; keys are those of ``Result``.
    """
    groups: list[dict[str, Any]] = []
    for count in sorted({dependent_parts(item) for item in run.items}):
        own_items = [i for i, item in enumerate(run.items) if dependent_parts(item) == count]
        results: list[dict[str, Any]] = []
        for candidate in run.candidates:
            base = run.measurements[baseline_of(run, candidate.dtype)]
            pairs = [(base[i], run.measurements[candidate.name][i]) for i in own_items]
            ratios = [slow.seconds / own.seconds for slow, own in pairs]
            right = [ratio for ratio, (slow, own) in zip(ratios, pairs, strict=True) if slow.right and own.right]
            results.append(
                {
                    "name": candidate.name,
                    "seconds_per_answer": median([own.seconds for _, own in pairs]),
                    "speedup": median(right),
                    "speedup_prompts": len(right),
                    "speedup_all": median(ratios),
                    "num_forwards": _mean([own.num_forwards for _, own in pairs]),
                    "answer_exact_match": _mean([float(own.right) for _, own in pairs]),
                }
            )
        groups.append({"dependent_parts": count, "num_prompts": len(own_items), "results": results})
    return groups


def kinds_of(run: Run) -> list[dict[str, Any]]:
    """Results by what bounds the gain from writing parts at once.

    The kinds are answers of independent parts, in up to three classes of their number; answers with text behind their
    parts; answers with parts that read other parts.

    Rates are sums divided by sums: where a prompt has many right answers, those of two candidates differ in length.
    """
    indices: dict[tuple[str, int, int], list[int]] = {}
    counts = sorted({len(item.sheet.parts) for item in run.items if kind_of(item) == INDEPENDENT})
    classes = (
        [found for part in np.array_split(counts, min(3, len(counts))) if (found := part.tolist())] if counts else []
    )
    for index, item in enumerate(run.items):
        kind, parts = kind_of(item), len(item.sheet.parts)
        among = next(own for own in classes if parts in own) if kind == INDEPENDENT else [0]
        indices.setdefault((kind, among[0], among[-1]), []).append(index)
    kinds: list[dict[str, Any]] = []
    for (kind, least, most), own in sorted(indices.items(), key=lambda found: (KINDS.index(found[0][0]), found[0][1])):
        results: list[dict[str, Any]] = []
        for candidate in run.candidates:
            chosen = [run.measurements[candidate.name][index] for index in own]
            tokens, seconds = sum(m.num_tokens for m in chosen), sum(m.seconds for m in chosen)
            forwards = max(sum(m.num_forwards for m in chosen), 1)
            results.append(
                {
                    "name": candidate.name,
                    "tokens_per_second": tokens / seconds,
                    "tokens_per_forward": tokens / forwards,
                    "num_tokens": tokens / len(own),
                    "answer_exact_match": _mean([float(m.right) for m in chosen]),
                }
            )
        parts = [least, most] if kind == INDEPENDENT else None
        kinds.append({"kind": kind, "parts": parts, "num_prompts": len(own), "results": results})
    return kinds


INDEPENDENT, FOLLOWED, DEPENDENT = KINDS = ("independent parts", "text behind the parts", "parts that read parts")


def kind_of(item: TestItem) -> str:
    """One of ``KINDS``."""
    if dependent_parts(item):
        return DEPENDENT
    rounds = [index for index, piece in enumerate(item.sheet.pieces) if not isinstance(piece, str)]
    behind = item.sheet.pieces[rounds[0] + 1 :] if rounds else ()
    return FOLLOWED if behind else INDEPENDENT


def dependent_parts(item: TestItem) -> int:
    """Parts of the answer that read other parts."""
    return sum(bool(part.depends) for part in item.sheet.parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(file: Path) -> str | None:
    """HEAD of the checkout that tracks ``file``, with ``-dirty`` when files of its folder were changed since; None when
    it is in no checkout, as in an installed wheel."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", file.name) is not None else None
    return f"{head}-dirty" if head and git("status", "--porcelain", "--untracked-files=no", "--", ".") else head
