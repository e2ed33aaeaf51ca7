"""kdfast in other trainers: each module is a program, run by ``python -m kdfast.examples.NAME``."""
