"""Files, locks, signals and errors of the operating system; imports no torch."""
