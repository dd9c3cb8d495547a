"""What a recipe makes of data: sheets, their plans and their tokenizer."""
