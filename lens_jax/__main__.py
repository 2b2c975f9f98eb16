"""`python -m lens_jax` is `lens-jax`."""

from lens_jax.cli import main

main()
