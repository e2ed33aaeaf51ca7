"""Terms of a student's loss beside cross-entropy and the divergence from the teacher: a file each, and a registry."""
