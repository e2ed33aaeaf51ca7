"""What ``kd_loss`` compares the student with: other forms of teachers and labels, and checks of their values."""
