"""Ridge regression with a kernel, with leave-one-out predictions in closed form. This module does not use the model.

The predictions for n images are b + f, with a free intercept b and a function f of the kernel K, an (n, n) matrix. b
and f minimize the sum of squared errors plus the squared norm of f. With A = K + I, u = A^-1 1 and
B = A^-1 - u u' / (1' u), the error of image i, when it is left out, is (B Y)_i / B_ii (Craven & Wahba, 1979).
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

SMALLEST = 1e-12
"""Lower bound of B_ii."""


def left_out(kernel: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the prediction for each image by a fit without this image: float64 of shape (n, k).

    Args:
        kernel: symmetric and positive semidefinite, (n, n), in units of the penalty.
        targets: (n, k).

    Examples:
        >>> left_out(np.zeros((3, 3)), np.array([[0.0], [3.0], [6.0]])).T  # the mean of the other two
        array([[4.5, 3. , 1.5]])
    """
    identity = np.eye(len(kernel))
    inverse = cho_solve(cho_factor(kernel + identity, lower=True), identity)
    sums = inverse.sum(axis=0)
    inverse -= np.outer(sums, sums) / sums.sum()
    return np.asarray(targets - (inverse @ targets) / np.diag(inverse).clip(min=SMALLEST)[:, None])


def squared_error(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Returns the sum over outputs of the squared error, mean over images."""
    return float(((predictions - targets) ** 2).sum(axis=1).mean())
