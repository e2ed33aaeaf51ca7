"""Terms that compare activations of student and teacher, one file each."""
