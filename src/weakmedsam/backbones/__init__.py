"""SAM-like networks behind one contract (``base.py``), one file each."""
