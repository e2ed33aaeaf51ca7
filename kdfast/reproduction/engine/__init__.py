"""The engine: what the runs of a study share, their execution, and a budget of time."""
