"""Trained runs used from Python and by other programs."""
