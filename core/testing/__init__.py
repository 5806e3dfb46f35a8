"""The kit for plugin authors: one module for each kind of contribution that it checks."""
