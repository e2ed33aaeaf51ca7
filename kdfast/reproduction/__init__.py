"""Reproduce figures and tables of papers: studies as data, and the engine that runs their cells."""
