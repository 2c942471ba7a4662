"""Speed and memory against PEFT, TRL, lm-evaluation-harness and the limit: `python -m benchmarks --help`."""
