"""Write the arrays of a cache and its manifest: from finished shards, or from logits that another program computed."""
