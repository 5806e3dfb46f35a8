"""The definition of each op in plain torch: what every other provider is held to."""
