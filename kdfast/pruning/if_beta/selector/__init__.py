"""IF-Beta as a subset selector for `kdfast prune` and `kdfast sweep`."""
