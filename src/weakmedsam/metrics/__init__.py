"""Segmentation and classification metrics."""
