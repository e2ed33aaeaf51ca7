"""The commands: one file per group; each parses its arguments, calls the library and prints the result."""
