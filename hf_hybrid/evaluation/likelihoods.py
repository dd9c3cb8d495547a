"""lm-eval with strategies: they write generation tasks; likelihood tasks are refused where they would be wrong.

``lm-eval --model hf`` hands ``--gen_kwargs`` to ``generate()``, so its generation tasks need nothing but ``install()``.
Its likelihood tasks call the model itself, which gives the likelihood of autoregressive writing, whatever strategy the
run names. Under a diffusion strategy that would be a number with a wrong label, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_hybrid.config import SETTINGS, stored_strategy

AUTOREGRESSIVE = frozenset({"autoregressive", "speculative"})
"""Strategies that write with the probabilities that the model's own forward gives."""


class LikelihoodError(ValueError):
    """A likelihood was asked for under a strategy whose likelihood one pass cannot give."""


def strategy_in(parsed: Any) -> str | None:
    """The strategy that ``--gen_kwargs`` names, in the output of lm-eval's own parser; None: it names none."""
    return (getattr(parsed, "gen_kwargs", None) or {}).get("strategy")


@contextmanager
def no_pretended_likelihoods(strategy: str | None) -> Iterator[None]:
    """Make lm-eval's HFLM refuse likelihoods of models that write by diffusion, while it is entered.

    Args:
        strategy: of the run; None: what ``generation_config.hf_hybrid`` of the model names.

    Raises:
        LikelihoodError: an unknown strategy; and, from lm-eval's own calls, a likelihood under a diffusion strategy.
    """
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    if strategy is not None and strategy not in SETTINGS:
        raise LikelihoodError(f"unknown strategy {strategy!r} in --gen_kwargs; choose one of {', '.join(SETTINGS)}")
    originals: dict[str, Callable[..., Any]] = {}

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            stored = getattr(getattr(self.model, "generation_config", None), "hf_hybrid", None)
            used = strategy or stored_strategy(stored)
            if used is not None and used not in AUTOREGRESSIVE:
                raise LikelihoodError(
                    f"{name}: strategy {used!r} has no likelihood that one pass gives, and the model's own is that of"
                    " autoregressive writing; run likelihood tasks with --gen_kwargs strategy=autoregressive, and"
                    f" generation tasks with {used!r}"
                )
            return original(self, *args, **kwargs)

        return call

    for name in ("loglikelihood", "loglikelihood_rolling"):
        originals[name] = getattr(HFLM, name)
        setattr(HFLM, name, guarded(name, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(HFLM, name, original)
