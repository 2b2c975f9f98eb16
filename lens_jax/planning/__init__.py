"""`lens-jax plan`: what a run needs and costs, read off the traced program before any device is paid for."""
