"""The benchmark: refattn's cpu engine beside its peers, in one run, with the error next to the time."""
