"""What happens around the training loop: SCE, PAM, pictures, history, throughput, preemption."""

from weakmedsam.callbacks.explore import SubClassExploration
from weakmedsam.callbacks.features import KeepFeatures
from weakmedsam.callbacks.history import History
from weakmedsam.callbacks.mine import PromptAffinityMining
from weakmedsam.callbacks.overlays import PredictionOverlays
from weakmedsam.callbacks.preempt import Preemption
from weakmedsam.callbacks.refinements import CompareRefinements
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
