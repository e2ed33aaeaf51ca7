"""Terms that compare logits, one file each; they work from cached logits of all classes."""
