"""Pure tensor functions and data: torch alone, no model, no tokenizer, no input or output."""
