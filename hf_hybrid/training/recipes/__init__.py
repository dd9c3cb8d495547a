"""What a recipe makes from data: sheets, their plans and their tokenizer."""
