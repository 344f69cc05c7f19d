"""What the founding papers claim and a CPU can check, found again through refattn's public functions alone."""
