"""The runtime: from a request to its tokens, one step of the whole batch at a time."""
