"""Measures speculative decoding beside plain decoding, stock prompt lookup and other packages."""

from benchmarks.speculation.checks import Difference, difference, loop_free_length
from benchmarks.speculation.journal import Journal, JournalError
from benchmarks.speculation.measure import Bench, run
from benchmarks.speculation.methods import METHODS, Method, Written
from benchmarks.speculation.pair import Numbers, Pair, PairSizes, random_pair, random_prompts
from benchmarks.speculation.prompts import CATEGORIES, Category, Prompt, copying, prompts_of
from benchmarks.speculation.results import (
    BatchResult,
    FlipResult,
    SpeculationResult,
    absent,
    batch_results,
    flip_results,
    speculation_json,
    speculation_results,
)
from benchmarks.speculation.trained import held_out_prompts, trained_pair

__all__ = [
    "CATEGORIES",
    "METHODS",
    "BatchResult",
    "Bench",
    "Category",
    "Difference",
    "FlipResult",
    "Journal",
    "JournalError",
    "Method",
    "Numbers",
    "Pair",
    "PairSizes",
    "Prompt",
    "SpeculationResult",
    "Written",
    "absent",
    "batch_results",
    "copying",
    "difference",
    "flip_results",
    "held_out_prompts",
    "loop_free_length",
    "prompts_of",
    "random_pair",
    "random_prompts",
    "run",
    "speculation_json",
    "speculation_results",
    "trained_pair",
]
