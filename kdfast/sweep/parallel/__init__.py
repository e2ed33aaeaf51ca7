"""Runs in parallel: in processes that share the memory of the images, or on a GPU in threads of one process."""
