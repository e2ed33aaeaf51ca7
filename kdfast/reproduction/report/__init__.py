"""The page and the picture of a study: its results beside the published values."""
