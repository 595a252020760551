"""First-order MAML: inner gradients are taken as constants."""

from typing import ClassVar

from common.meta.learner import InnerLoop

__all__ = ["Fomaml"]


class Fomaml(InnerLoop):
    """MAML without the second-order terms: the query gradient at the adapted weights.

    References
    ----------
    Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, section 5.2; Nichol, Achiam and Schulman, "On
    First-Order Meta-Learning Algorithms", 2018, section 2.
    """

    name: ClassVar[str] = "fomaml"
    second_order: ClassVar[bool] = False
