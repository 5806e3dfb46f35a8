"""The model toolkit: what architectures are declared with."""
