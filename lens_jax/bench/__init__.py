"""`lens-jax bench`: speed as a ratio, measured in one run on one machine, one module a benchmark."""
