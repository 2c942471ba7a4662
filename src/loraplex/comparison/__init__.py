"""Arms × seeds under one budget: planning, running, statistics and the report. `loraplex compare` is the way in."""
