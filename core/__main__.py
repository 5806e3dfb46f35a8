"""`python -m plexor` is the command line."""

import sys

from plexor.cli import main

if __name__ == "__main__":
    sys.exit(main())
