"""What fits this machine, this text and this time: said before any of it is spent."""
