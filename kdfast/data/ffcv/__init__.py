"""FFCV .beton files: write, read and validate them."""
