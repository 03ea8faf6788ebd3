"""Learn an optimizer on your own family of problems, and use it as a `torch.optim.Optimizer`."""

from learned_opt._version import __version__
from learned_opt.artifact import Artifact, load, load_artifact, save_artifact, shipped
from learned_opt.guard import GuardConfig
from learned_opt.initialize import copy_initial_parameters
from learned_opt.optimizer import LearnedOptimizer
from learned_opt.task import TaskFamily

__all__ = [
    "Artifact",
    "GuardConfig",
    "LearnedOptimizer",
    "TaskFamily",
    "__version__",
    "copy_initial_parameters",
    "load",
    "load_artifact",
    "save_artifact",
    "shipped",
]
