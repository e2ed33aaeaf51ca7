"""The `kdfast cache` commands, on images and on texts."""
