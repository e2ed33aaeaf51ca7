"""Theorem 3.1 of Ben-Baruch et al., checked by formula and by simulation, and where it fails."""
