"""The functions for programs: the whole flow from data to a student, each a thin layer over what the commands use."""
