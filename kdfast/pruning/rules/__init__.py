"""Selection rules: select the samples of a group by their scores."""
