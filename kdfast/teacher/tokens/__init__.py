"""Cache of a language model's log-probabilities, token by token: written from files or by a program, read by lookup."""
