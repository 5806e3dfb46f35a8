"""Mixture-of-experts decoders: the router, the expert layer and the architectures that use them."""
