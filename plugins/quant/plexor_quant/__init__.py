"""Number formats for the weights, activations and cache of any architecture."""
