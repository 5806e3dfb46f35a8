"""The definitions in plain torch, which run on every device."""
