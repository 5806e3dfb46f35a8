"""What a model's folder holds, checked before use: JSON files, tokenizer, and tensors that are read one at a time."""
