"""Estimates of time and disk space of the whole flow, from rates measured on this machine."""
