"""Comparisons of the project with others, and the data of its checkpoint; no part of the wheel.

`speculative` compares speculative decoding with plain decoding and other packages, `train` trains a recipe on the data
of `data/`, and `smollm2` writes SmolLM2 into a folder. Each is run as ``python -m benchmarks.NAME``.
"""
