"""See and correct pseudo-labels: a page on this machine, and the clicks replayed."""
