"""Fast forward and backward passes as autograd functions in plain torch; each has its naive form in tests/reference."""
