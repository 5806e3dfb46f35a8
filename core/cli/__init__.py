"""The command line: `plexor COMMAND`; each command is a module here, and plugins may add more."""

from plexor.cli.main import main

__all__ = ["main"]
