"""Forms of plans. A checkpoint names its own in ``config.hf_hybrid["grammar"]`` (absent: ``native``)."""

from __future__ import annotations

from hf_hybrid.core.grammars.grammar import Entry as Entry
from hf_hybrid.core.grammars.grammar import Grammar as Grammar
from hf_hybrid.core.grammars.grammar import PlanState as PlanState
from hf_hybrid.core.grammars.native import NativeGrammar as NativeGrammar
from hf_hybrid.core.plan import PlanLimits
from hf_hybrid.core.tokens import ControlTokens, VocabularyError

GRAMMARS: dict[str, type[Grammar]] = {
    "native": NativeGrammar,
}
"""Name in the record of a checkpoint -> its grammar."""


def grammar_class(name: object) -> type[Grammar]:
    """The grammar of that name; an unknown one is a ``VocabularyError`` that lists the choices."""
    if not isinstance(name, str) or name not in GRAMMARS:
        raise VocabularyError(
            f"config.hf_hybrid['grammar']: unknown grammar {name!r}; choose from {', '.join(GRAMMARS)}"
        )
    return GRAMMARS[name]


def grammar_of(control: ControlTokens, vocab_size: int | None = None, limits: PlanLimits | None = None) -> Grammar:
    """The grammar that reads the tags of a model.

    Args:
        control: tokens of the model. vocab_size: width of its logits; None: see ``Grammar``. limits: caps on a plan.

    Raises:
        VocabularyError: the model has no tags, or its grammar is unknown.
    """
    if control.tags is None:
        raise VocabularyError(
            "plans need control tokens, and the model has a mask token alone; add them with "
            "hf_hybrid.prepare_vocabulary(model, tokenizer) and train it"
        )
    return grammar_class(control.grammar)(control, vocab_size, limits)
