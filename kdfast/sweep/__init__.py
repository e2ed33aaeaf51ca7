"""Sweeps: methods x fractions x with and without the teacher x seeds, one row per run, one table."""
