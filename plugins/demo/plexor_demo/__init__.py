"""Small trained checkpoints in Hugging Face layout, to try Plexor and to test it."""
