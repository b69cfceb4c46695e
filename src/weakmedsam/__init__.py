"""WeakMedSAM: medical image segmentation from image-level labels (Wang et al., IEEE TMI 2025)."""

__version__ = "0.2.0"
