"""Triton kernels of ``kd_loss``, and the code that launches them."""
