"""Report pages about one run and about several; imports no torch."""
