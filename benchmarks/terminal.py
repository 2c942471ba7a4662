"""Where the benchmarks write: tables to stdout, progress to stderr."""

import sys

from rich.console import Console

# Into a file or a pipe there is no width to fit into.
output = Console(width=None if sys.stdout.isatty() else 160)
errors = Console(stderr=True)
