"""Teachers: what they say, cached."""
