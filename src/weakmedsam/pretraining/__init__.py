"""Pre-training of the embedded backbone on procedurally drawn images: ``python -m weakmedsam.pretraining``."""
