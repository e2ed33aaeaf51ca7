"""The `kdfast teacher` commands."""
