"""Readers: open files of each supported kind as a `Source`."""
