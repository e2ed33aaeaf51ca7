"""Images as files: folders by class, lists of paths, and the decoding of one file."""
