"""Several processes that do the work of one, as `torchrun` starts them."""
