"""The recipe of a run beside its loss: optimizer, averaged weights, mixed batches."""
