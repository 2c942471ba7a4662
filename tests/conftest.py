"""Settings for every test: no network, and one thread per worker where workers share the cores."""

import os

# Read when the hub client and torch are first imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
