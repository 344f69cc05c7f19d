"""The golden suite: build it, verify it byte for byte, compare other people's results with it."""
