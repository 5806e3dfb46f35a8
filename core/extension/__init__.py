"""The extension host: what plugins may contribute, how they are found, and what they brought."""
