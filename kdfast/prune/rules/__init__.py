"""Selection rules: choose samples of a group by their scores."""
