"""The ranks that serve one model together, and what they exchange."""
