"""`python -m loraplex`, the same as the command `loraplex`."""

import sys

from loraplex.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
