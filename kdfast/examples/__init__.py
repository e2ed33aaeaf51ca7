"""kd_loss at home in other trainers: each module is one runnable program, ``python -m kdfast.examples.NAME``."""
