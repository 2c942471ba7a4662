"""Base models: the embedded one, and loading any other with errors of one line."""
