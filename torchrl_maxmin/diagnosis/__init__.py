"""What one reward for all costs the groups: diversity, bounds, alignment gap, without training a policy."""

from torchrl_maxmin.diagnosis.analysis import Diagnosis, diagnose
from torchrl_maxmin.diagnosis.theorem import distinctness, diversity, lemma1_bound, theorem1_bound

__all__ = ["Diagnosis", "diagnose", "distinctness", "diversity", "lemma1_bound", "theorem1_bound"]
