"""Dense decoders of the LLaMA and GPT families, each a short declaration over the core's toolkit."""
