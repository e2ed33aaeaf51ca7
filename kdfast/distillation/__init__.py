"""Distillation: train a student on a subset with a teacher's help, resumable after any step."""
