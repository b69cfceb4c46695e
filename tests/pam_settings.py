"""Settings of PAM by short names: ``pam_settings(walk__steps=0)`` for ``Refinement(walk=Walk(steps=0))``."""

from weakmedsam.callbacks import PromptAffinityMining
from weakmedsam.pam.config import Refinement, Start, Validation

DEFAULT = Refinement()


def pam_settings(base=DEFAULT, **changes):
    return base.changed({name.replace("__", "."): value for name, value in changes.items()})


def pam_callback(start=None, presence="given", every_n_epochs=1, pictures=6, **changes):
    settings = pam_settings(**changes)
    groups = {name: getattr(settings, name) for name in Refinement.__dataclass_fields__}
    return PromptAffinityMining(
        **groups, start=Start(start, presence), validation=Validation(every_n_epochs), pictures=pictures
    )
