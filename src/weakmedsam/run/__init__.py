"""A run: its stages, their state and order; imports no torch."""
