"""Self-test: is what each strategy writes with this model exact, on this machine?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_hybrid.config import SETTINGS, settings_for
from hf_hybrid.decoding import Draft, Drafter, Sampler, Text
from hf_hybrid.evaluation.self_passes import ROWS, Passes
from hf_hybrid.mixin import HybridGenerationMixin
from hf_hybrid.models.host import Unsupported, position_table, start_device, text_config, unwrapped
from hf_hybrid.models.opening import runner_of
from hf_hybrid.models.probe import tolerance
from hf_hybrid.models.vocabulary import VocabularyError, control_tokens, noise_tokens, width_of
from hf_hybrid.routing import host_arguments, routed

Result = Literal["served", "exact", "refused", "not exact here"]
NEW = 16
"""Tokens of every text."""
_LONG, _SHORT = 24, 17
_LONGEST_WINDOW = 1024
"""Prompts reach beyond windows and chunks up to this length; longer ones would take more than a few seconds."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one strategy.

    Attributes:
        name: of the strategy and what is special. strategy: a key of ``hf_hybrid.config.SETTINGS``.
        result: "exact", "refused" or "not exact here"; "served" where only the config was read.
        reason: why, and what to do; or what differed. Empty: nothing.
    """

    name: str
    strategy: str
    result: Result
    reason: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found.

    Attributes:
        model: its class. verdicts: one for every way to write.
    """

    model: str
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """True: nothing is "not exact here"."""
        return all(verdict.result != "not exact here" for verdict in self.verdicts)


@dataclass(frozen=True)
class Way:
    """One way to write: its settings, the passes that it stands on, and what it needs of a Runner beside those of its
    settings."""

    name: str
    strategy: str
    settings: dict[str, Any]
    passes: tuple[str, ...]
    abilities: tuple[str, ...] = ()


_DRAFTS = ("padding", "steps", "rejected")
WAYS = (
    Way("autoregressive", "autoregressive", {}, ("padding",)),
    Way("speculative, chains", "speculative", {"adaptive": False}, _DRAFTS),
    Way("speculative, trees", "speculative", {"adaptive": False}, (*_DRAFTS, "branches"), ("branches",)),
    Way("speculative, self", "speculative", {"adaptive": False, "drafter": "self"}, (*_DRAFTS, "noisy_rows")),
    Way("block_diffusion", "block_diffusion", {}, ("padding", "rejected", "noisy_rows")),
    Way("planned_diffusion", "planned_diffusion", {}, (*_DRAFTS, "spans", "noisy_rows")),
)


def expected(model: Any) -> CheckReport:
    """What the config of ``model`` says, without a pass; its weights may be on the meta device."""
    verdicts = tuple(_expected(model, way) for way in WAYS)
    return CheckReport(type(unwrapped(model)).__name__, verdicts)


def _expected(model: Any, way: Way) -> Verdict:
    settings = settings_for(way.strategy, way.settings)
    try:
        runner = runner_of(model)
        wanted = dict.fromkeys((*settings.abilities, *way.abilities))
        if lacking := [name.replace("_", " ") for name in wanted if not getattr(runner.abilities, name)]:
            raise Unsupported(
                f"it needs {' and '.join(lacking)}, and {runner.__name__}, which runs this model, has none; use "
                "strategy='autoregressive'"
            )
        control = control_tokens(model) if settings.needs == "grammar" else None
        if settings.needs == "noise" and noise_tokens(model) is None:
            raise Unsupported(f"it needs a mask token, and the model has none; {_ADD}")
        if settings.needs == "grammar" and (control is None or control.tags is None):
            raise Unsupported(f"it needs the tags of a plan, and the model has none; {_ADD}")
    except (Unsupported, VocabularyError) as error:
        return Verdict(way.name, way.strategy, "refused", str(error))
    return Verdict(way.name, way.strategy, "served")


_ADD = "add them with hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"


def check(model: Any, *, seed: int = 0) -> CheckReport:
    """Run every strategy on ``model`` for a few seconds, and say of each whether it is exact.

    Random prompts, written greedily, are compared with the host's own text, and passes with the model's own forward.
    The model is left as it was; it need not be enabled.

    Args:
        model: a loaded causal model in eval mode.
        seed: of the prompts.

    Raises:
        Unsupported: the model is in training mode, or no model, or the host itself cannot write with it; the message
            says what to do.
    """
    host = unwrapped(model)
    if not isinstance(host, torch.nn.Module) or not hasattr(host, "config"):
        raise Unsupported(
            f"{type(model).__name__} is no loaded model; give one of AutoModelForCausalLM.from_pretrained"
        )
    if host.training:
        raise Unsupported(f"{type(host).__name__} is in training mode, where passes differ; call model.eval() first")
    asked = expected(model)
    if all(verdict.result == "refused" for verdict in asked.verdicts):
        return asked
    try:
        trial = _Trial(host, seed)
    except Exception as error:  # whatever the code of the model does
        raise Unsupported(
            f"the host's own generate() fails with {type(host).__name__} ({type(error).__name__}: {error}); mend that "
            "first, strategies begin where it does"
        ) from error
    verdicts = [
        trial.verdict(way) if verdict.result == "served" else verdict
        for way, verdict in zip(WAYS, asked.verdicts, strict=True)
    ]
    return CheckReport(asked.model, tuple(verdicts))


class _Trial:
    """Prompts, the host's texts of them, and what the passes showed."""

    def __init__(self, model: Any, seed: int):
        self.model = model
        self.known: dict[str, str] = {}  # check of passes -> what it found
        draw = torch.Generator().manual_seed(seed)
        ids = torch.tensor(_plain_ids(model))
        sizes = _lengths(model)
        every = [ids[torch.randint(len(ids), (size,), generator=draw)].tolist() for size in (*sizes, ROWS, ROWS)]
        self.prompts = every[:2]
        other, wrong = every[2], [b if a != b else int(ids[0]) for a, b in zip(every[2], every[3], strict=True)]
        self.passes = Passes(model, every[0], every[1], other, wrong)
        self.texts = [self._write([prompt])[0] for prompt in self.prompts]

    def verdict(self, way: Way) -> Verdict:
        result: Result = "not exact here"
        try:
            reason = next((found for name in way.passes if (found := self._pass(name))), "") or self._texts(way)
        except ValueError as error:  # refused by the call itself: probed, or a seam of the host that is missing
            result, reason = "refused", str(error)
        except Exception as error:  # whatever the code of the model does
            reason = f"it breaks ({type(error).__name__}: {error})"
        return Verdict(way.name, way.strategy, result if reason else "exact", reason)

    def _pass(self, name: str) -> str:
        """What a check of passes found, once for all strategies that stand on it."""
        if name not in self.known:
            try:
                self.known[name] = getattr(self.passes, name)()
            except Unsupported:
                raise
            except Exception as error:  # whatever the code of the model does
                self.known[name] = f"a pass breaks ({name.replace('_', ' ')}; {type(error).__name__}: {error})"
        return self.known[name]

    def _texts(self, way: Way) -> str:
        """Compare the texts of one prompt, and of both in one batch."""
        settings = dict(way.settings)
        if way.strategy == "speculative" and "drafter" not in settings:
            known = [prompt + text for prompt, text in zip(self.prompts, self.texts, strict=True)]
            settings["drafter"] = _Replay(known, width_of(self.model), tree="branches" in way.abilities)
        exact_text = SETTINGS[way.strategy].one_text
        for prompts, wanted in ((self.prompts[:1], self.texts[:1]), (self.prompts, self.texts)):
            texts = self._write(prompts, way.strategy, **settings)
            if way.strategy == "planned_diffusion":
                wanted = self._write(prompts, way.strategy, span_decoding="autoregressive")
            if not exact_text and way.strategy != "planned_diffusion":
                continue
            for prompt, text, right in zip(prompts, texts, wanted, strict=True):
                if (place := self._difference(prompt, text, right)) is not None:
                    among = "" if len(prompts) == 1 else f" in a batch of {len(prompts)} unequal prompts"
                    return f"token {place + 1} of a greedy text is another one than without drafts{among}"
        return ""

    def _difference(self, prompt: list[int], text: list[int], right: list[int]) -> int | None:
        """Where ``text`` leaves ``right`` by more than rounding: two tokens that were as likely are no difference."""
        place = next((i for i, (a, b) in enumerate(zip(text, right, strict=False)) if a != b), None)
        if place is None:
            return None if len(text) == len(right) else min(len(text), len(right))
        scores = self.passes.read([*prompt, *right[:place]], 1)[0]
        gap = float(scores[right[place]] - scores[text[place]])
        return place if abs(gap) > tolerance(scores.dtype) * float(scores.double().std()) else None

    def _write(self, prompts: list[list[int]], strategy: str | None = None, **settings: Any) -> list[list[int]]:
        """Greedy texts of ``NEW`` tokens; by the host without a strategy."""
        width, device = max(map(len, prompts)), start_device(self.model)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        call: dict[str, Any] = {"inputs": ids, "attention_mask": mask, "do_sample": False, "num_beams": 1}
        call |= {"max_new_tokens": NEW, "pad_token_id": 0}
        if strategy is None or SETTINGS[strategy].one_text:  # the others end when their parts do
            call["min_new_tokens"] = NEW
        if strategy is not None:
            call = host_arguments(self.model, {**call, **settings}, strategy, None)
        # Beyond the mixin, which would read a strategy from the generation config; what install() put there sees that
        # the call is routed.
        enabled = isinstance(self.model, HybridGenerationMixin)
        host: Any = super(HybridGenerationMixin, self.model) if enabled else self.model
        generate = host.generate if enabled else functools.partial(type(host).generate, host)
        with routed(self.model), torch.no_grad():
            found = generate(**call)
        return found[:, width:].tolist()


class _Replay(Drafter):
    """Drafts the text that the host wrote, every third token wrong; as a tree, with the right one beside it."""

    name = "replay"

    def __init__(self, known: list[list[int]], vocab: int, *, tree: bool):
        self.known, self.vocab, self.tree = known, vocab, tree

    def propose(self, texts: Sequence[Text], length: int, sampler: Sampler) -> list[Draft]:
        return [self._draft(text.tokens, min(length, text.room)) for text in texts]

    def _draft(self, tokens: list[int], length: int) -> Draft:
        count = len(tokens)
        right = next((known[count:] for known in self.known if known[:count] == list(tokens)), [])
        if not self.tree:
            chain = [(token + 1) % self.vocab if (count + i) % 3 == 2 else token for i, token in enumerate(right)]
            return Draft(chain[:length])
        nodes: list[int] = []
        parents: list[int] = []
        last = -1
        for token in right[: length // 2]:  # the wrong one first, then the right one, which the next two follow
            nodes += [(token + 1) % self.vocab, token]
            parents += [last, last]
            last = len(nodes) - 1
        return Draft(nodes, parents=tuple(parents), ranks=(0, 1) * (len(nodes) // 2)) if nodes else Draft([])


def _plain_ids(model: Any) -> list[int]:
    """Ids of the vocabulary that mean nothing special."""
    config, text = unwrapped(model).config, text_config(model)
    special: set[int] = set()
    for one in (config, text, getattr(model, "generation_config", None)):
        for name, value in vars(one or object).items():
            if name.endswith(("_token_id", "_token_index")):
                special |= {v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)}
    record = getattr(config, "hf_hybrid", None)
    for value in record.values() if isinstance(record, dict) else ():
        special |= set(_ints(value))
    size = min(width_of(model), text.vocab_size)
    return [token for token in range(size) if token not in special]


def _ints(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [number for one in value for number in _ints(one)]
    return [value] if isinstance(value, int) else []


def _lengths(model: Any) -> tuple[int, int]:
    """Of two prompts: long enough to leave windows and chunks, where those are not too long."""
    config = text_config(model)
    near = [
        getattr(config, name, None) or 0 for name in ("sliding_window", "sliding_window_size", "attention_chunk_size")
    ]
    more = max([size for size in near if size <= _LONGEST_WINDOW], default=0)
    most = (position_table(model) or 1 << 30) - NEW - 4 * ROWS
    long = max(2, min(_LONG + more, most))
    return long, max(1, long - (_LONG - _SHORT))
