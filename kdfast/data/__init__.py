"""Data: sources, loaders, order, views and subset files."""
