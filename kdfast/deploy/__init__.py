"""Use a trained network elsewhere: export it with a model card, or classify images with it."""
