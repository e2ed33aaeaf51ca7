"""``linear_kd_loss`` in trainers of language models; programs like those of ``kdfast.examples``."""
