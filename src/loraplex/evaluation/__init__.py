"""How good a model is: options compared by likelihood, classes told apart, or answers matched; with standard errors."""
