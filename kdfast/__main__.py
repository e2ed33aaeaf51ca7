"""`python -m kdfast` is the `kdfast` command."""

from kdfast.cli import main

if __name__ == "__main__":
    main()
