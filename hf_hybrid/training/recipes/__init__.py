"""Ready-made training recipes: data, tokenizer and task of a small model each."""
