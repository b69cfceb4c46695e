"""Several data sets, variants and seeds run by one command, and one page about them."""
