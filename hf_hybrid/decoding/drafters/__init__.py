"""Drafters: who proposes the tokens that speculative decoding checks."""
