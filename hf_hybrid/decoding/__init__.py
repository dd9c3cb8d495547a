"""Decoding: ids in, ids out. Ways of writing are in the literal table ``WRITERS``."""

from hf_hybrid.decoding.call import Call, Context, Queue
from hf_hybrid.decoding.drafters.diffusion import DiffusionDrafter
from hf_hybrid.decoding.drafters.drafter import Draft, Drafter, DrafterError, Sampler, Text
from hf_hybrid.decoding.drafters.memory import MemoryFileError, SuffixMemory
from hf_hybrid.decoding.drafters.model import ModelDrafter
from hf_hybrid.decoding.drafters.suffix import SuffixDrafter
from hf_hybrid.decoding.drafters.tree import TreeDrafter
from hf_hybrid.decoding.engine import decode, prompt_fault
from hf_hybrid.decoding.output import (
    Answer,
    DecodingError,
    DraftingReport,
    GenerationReport,
    HybridGenerateOutput,
    SpanReport,
)
from hf_hybrid.decoding.processors import PlanLogitsProcessor, Processors
from hf_hybrid.decoding.writer import Writer
from hf_hybrid.decoding.writers import WRITERS

__all__ = [
    "WRITERS",
    "Answer",
    "Call",
    "Context",
    "DecodingError",
    "DiffusionDrafter",
    "Draft",
    "Drafter",
    "DrafterError",
    "DraftingReport",
    "GenerationReport",
    "HybridGenerateOutput",
    "MemoryFileError",
    "ModelDrafter",
    "PlanLogitsProcessor",
    "Processors",
    "Queue",
    "Sampler",
    "SpanReport",
    "SuffixDrafter",
    "SuffixMemory",
    "Text",
    "TreeDrafter",
    "Writer",
    "decode",
    "prompt_fault",
]
