"""Compile kdfast's Triton kernels for a GPU that need not be there, and count the instructions that they would issue.

``driver`` replaces Triton's CUDA driver: kdfast's own launch code compiles to machine code, and nothing is launched.
``sass`` reads the machine code, ``thread`` follows one thread through it, and ``counts`` sums that up. ``cases`` lists
the launches of all kernels, and ``bounds`` holds them against recorded limits.
"""
