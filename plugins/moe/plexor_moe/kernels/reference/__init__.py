"""The definitions of the ops, in plain torch."""
