"""Ways of writing an answer, one module each; ``hf_hybrid.decoding.writers.table`` names them."""
