"""Entry point of `python -m kdfast`, the same as the `kdfast` command."""

from kdfast.cli import main

if __name__ == "__main__":
    main()
