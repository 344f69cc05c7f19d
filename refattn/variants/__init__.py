"""One module per variant or term; the registry finds them by file name."""
