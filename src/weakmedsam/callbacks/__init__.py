"""What happens around the training loop: SCE, PAM, pictures, history, throughput, preemption."""

from weakmedsam.callbacks.history import History
from weakmedsam.callbacks.overlays import PredictionOverlays
from weakmedsam.callbacks.pam import PromptAffinityMining
from weakmedsam.callbacks.pam_ablation import CompareRefinements
from weakmedsam.callbacks.pam_cache import KeepFeatures
from weakmedsam.callbacks.preemption import Preemption
from weakmedsam.callbacks.sce import SubClassExploration
from weakmedsam.callbacks.throughput import Throughput

__all__ = [
    "CompareRefinements",
    "History",
    "KeepFeatures",
    "PredictionOverlays",
    "Preemption",
    "PromptAffinityMining",
    "SubClassExploration",
    "Throughput",
]
