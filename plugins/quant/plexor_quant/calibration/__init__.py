"""Rounding that looks at a text: statistics of each layer's input, GPTQ, clip search, smoothing."""
