"""The ops of plexor-moe: a folder for each provider, a file for each op, samples that hold them together."""
