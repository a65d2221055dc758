"""Loss along the next step, and predictiveness of the gradient.

Source: Santurkar, Tsipras, Ilyas & Madry 2018, "How Does Batch Normalization Help Optimization?", section 3.2
and Figure 4 (a, b).
"""

import math

import torch
from torch import Tensor

from trainer.probes.objective import Objective

STEP_SIZES = (0.5, 1.0, 2.0, 4.0)
"""Step sizes to measure, as multiples of the learning rate."""


def landscape(objective: Objective, gradient: Tensor, rate: float) -> dict[str, float]:
    """Measure loss and gradient at steps along the gradient.

    From weights w with gradient g, on one batch, for h of 0.5, 1, 2 and 4 times the learning rate:

        loss_min, loss_max, loss_range    min, max and their difference of L(w - h·g)
        gradient_change                      max of ‖∇L(w - h·g) - g‖₂
        gradient_change_ratio                gradient_change / ‖g‖₂

    The direction is that of the plain gradient, for every optimizer. Cost: four forward and four backward
    passes.
    """
    losses, squares = [], []
    for size in STEP_SIZES:
        with objective.moved(gradient, size * rate):
            loss, there = objective.loss_and_gradient()
        change = there - gradient
        losses.append(loss)
        squares += objective.dot_products([(change, change)])
    [length] = objective.dot_products([(gradient, gradient)])
    least, most = torch.tensor(losses, dtype=torch.float64).aminmax()  # NaN if any loss is
    largest = math.sqrt(torch.tensor(squares, dtype=torch.float64).max())
    return {
        "loss_min": float(least),
        "loss_max": float(most),
        "loss_range": float(most - least),
        "gradient_change": largest,
        "gradient_change_ratio": largest / math.sqrt(length) if length > 0 else math.nan,
    }
