"""Per-sample gradients of parameters whose layers have no formula, one operation of the forward pass at a time.

What a layer computes is known from the operations that it runs on its parameters: a scaling, a sum, a matrix product.
``trace`` records them, ``rules`` has formulas for common ones, and ``recompute`` runs the others again on each sample.
"""
