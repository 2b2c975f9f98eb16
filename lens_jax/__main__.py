"""`lens-jax`, which is `python -m lens_jax` too."""

from lens_jax.environment import settle


def main() -> None:
    settle()
    from lens_jax.cli import main

    main()


if __name__ == "__main__":
    main()
