"""Data sets: one file each, from volumes on disk to batches of slices."""
