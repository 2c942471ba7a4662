"""Comparisons of accuracy that take too long for the tests, and the data they need."""
