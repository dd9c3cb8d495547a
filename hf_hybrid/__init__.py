"""Planned diffusion, block diffusion and other ways to write text for the models of Hugging Face transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_hybrid.config import Settings as Settings
    from hf_hybrid.config import SettingsError as SettingsError
    from hf_hybrid.core.grammars import grammar_of as grammar_of
    from hf_hybrid.core.plan import Plan as Plan
    from hf_hybrid.core.plan import PlanError as PlanError
    from hf_hybrid.core.plan import Span as Span
    from hf_hybrid.core.tokens import ControlTokens as ControlTokens
    from hf_hybrid.decoding import Answer as Answer
    from hf_hybrid.decoding import DecodingError as DecodingError
    from hf_hybrid.decoding import DiffusionDrafter as DiffusionDrafter
    from hf_hybrid.decoding import Draft as Draft
    from hf_hybrid.decoding import Drafter as Drafter
    from hf_hybrid.decoding import DrafterError as DrafterError
    from hf_hybrid.decoding import GenerationReport as GenerationReport
    from hf_hybrid.decoding import HybridGenerateOutput as HybridGenerateOutput
    from hf_hybrid.decoding import MemoryFileError as MemoryFileError
    from hf_hybrid.decoding import ModelDrafter as ModelDrafter
    from hf_hybrid.decoding import PlanLogitsProcessor as PlanLogitsProcessor
    from hf_hybrid.decoding import Sampler as Sampler
    from hf_hybrid.decoding import SuffixDrafter as SuffixDrafter
    from hf_hybrid.decoding import SuffixMemory as SuffixMemory
    from hf_hybrid.decoding import Text as Text
    from hf_hybrid.decoding import TreeDrafter as TreeDrafter
    from hf_hybrid.evaluation.self_test import CheckReport as CheckReport
    from hf_hybrid.evaluation.self_test import check as check
    from hf_hybrid.hub.push import push_to_hub as push_to_hub
    from hf_hybrid.hub.saving import HybridCallback as HybridCallback
    from hf_hybrid.hub.saving import save_pretrained as save_pretrained
    from hf_hybrid.many import generate_many as generate_many
    from hf_hybrid.mixin import AutoHybridModelForCausalLM as AutoHybridModelForCausalLM
    from hf_hybrid.mixin import AutoHybridModelForImageTextToText as AutoHybridModelForImageTextToText
    from hf_hybrid.mixin import HybridGenerationMixin as HybridGenerationMixin
    from hf_hybrid.mixin import disable as disable
    from hf_hybrid.mixin import enable as enable
    from hf_hybrid.mixin import install as install
    from hf_hybrid.mixin import uninstall as uninstall
    from hf_hybrid.models.secure import AutoHybridTokenizer as AutoHybridTokenizer
    from hf_hybrid.models.secure import secure as secure
    from hf_hybrid.models.vocabulary import VocabularyError as VocabularyError
    from hf_hybrid.models.vocabulary import control_tokens as control_tokens
    from hf_hybrid.models.vocabulary import prepare_vocabulary as prepare_vocabulary
    from hf_hybrid.pipeline import HybridTextGenerationPipeline as HybridTextGenerationPipeline
    from hf_hybrid.pipeline import register_pipeline as register_pipeline
    from hf_hybrid.portable import PortableError as PortableError
    from hf_hybrid.routing import UnsupportedCallError as UnsupportedCallError

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "AutoHybridModelForCausalLM",
    "AutoHybridModelForImageTextToText",
    "AutoHybridTokenizer",
    "CheckReport",
    "ControlTokens",
    "DecodingError",
    "DiffusionDrafter",
    "Draft",
    "Drafter",
    "DrafterError",
    "GenerationReport",
    "HybridCallback",
    "HybridGenerateOutput",
    "HybridGenerationMixin",
    "HybridTextGenerationPipeline",
    "MemoryFileError",
    "ModelDrafter",
    "Plan",
    "PlanError",
    "PlanLogitsProcessor",
    "PortableError",
    "Sampler",
    "Settings",
    "SettingsError",
    "Span",
    "SuffixDrafter",
    "SuffixMemory",
    "Text",
    "TreeDrafter",
    "UnsupportedCallError",
    "VocabularyError",
    "__version__",
    "check",
    "control_tokens",
    "disable",
    "enable",
    "generate_many",
    "grammar_of",
    "install",
    "prepare_vocabulary",
    "push_to_hub",
    "register_pipeline",
    "save_pretrained",
    "secure",
    "uninstall",
]

_HOME = {
    "Settings": "hf_hybrid.config",
    "SettingsError": "hf_hybrid.config",
    "grammar_of": "hf_hybrid.core.grammars",
    "Plan": "hf_hybrid.core.plan",
    "PlanError": "hf_hybrid.core.plan",
    "Span": "hf_hybrid.core.plan",
    "ControlTokens": "hf_hybrid.core.tokens",
    "Answer": "hf_hybrid.decoding",
    "DecodingError": "hf_hybrid.decoding",
    "DiffusionDrafter": "hf_hybrid.decoding",
    "Draft": "hf_hybrid.decoding",
    "Drafter": "hf_hybrid.decoding",
    "DrafterError": "hf_hybrid.decoding",
    "GenerationReport": "hf_hybrid.decoding",
    "HybridGenerateOutput": "hf_hybrid.decoding",
    "MemoryFileError": "hf_hybrid.decoding",
    "ModelDrafter": "hf_hybrid.decoding",
    "PlanLogitsProcessor": "hf_hybrid.decoding",
    "Sampler": "hf_hybrid.decoding",
    "SuffixDrafter": "hf_hybrid.decoding",
    "SuffixMemory": "hf_hybrid.decoding",
    "Text": "hf_hybrid.decoding",
    "TreeDrafter": "hf_hybrid.decoding",
    "CheckReport": "hf_hybrid.evaluation.self_test",
    "check": "hf_hybrid.evaluation.self_test",
    "push_to_hub": "hf_hybrid.hub.push",
    "HybridCallback": "hf_hybrid.hub.saving",
    "save_pretrained": "hf_hybrid.hub.saving",
    "generate_many": "hf_hybrid.many",
    "AutoHybridModelForCausalLM": "hf_hybrid.mixin",
    "AutoHybridModelForImageTextToText": "hf_hybrid.mixin",
    "HybridGenerationMixin": "hf_hybrid.mixin",
    "disable": "hf_hybrid.mixin",
    "enable": "hf_hybrid.mixin",
    "install": "hf_hybrid.mixin",
    "uninstall": "hf_hybrid.mixin",
    "AutoHybridTokenizer": "hf_hybrid.models.secure",
    "secure": "hf_hybrid.models.secure",
    "VocabularyError": "hf_hybrid.models.vocabulary",
    "control_tokens": "hf_hybrid.models.vocabulary",
    "prepare_vocabulary": "hf_hybrid.models.vocabulary",
    "HybridTextGenerationPipeline": "hf_hybrid.pipeline",
    "register_pipeline": "hf_hybrid.pipeline",
    "PortableError": "hf_hybrid.portable",
    "UnsupportedCallError": "hf_hybrid.routing",
}
"""Public name -> its module, imported on first use (PEP 562): `import hf_hybrid` alone loads no torch."""


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        note = import_module("hf_hybrid.models.release").release_note()
        raise ImportError(f"{error}{note}", name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
