"""What happens around the training loop: SCE, PAM, pictures, history."""

from weakmedsam.callbacks.compare import CompareRefinements
from weakmedsam.callbacks.explore import SubClassExploration
from weakmedsam.callbacks.history import History
from weakmedsam.callbacks.mine import PromptAffinityMining

__all__ = ["CompareRefinements", "History", "PromptAffinityMining", "SubClassExploration"]
