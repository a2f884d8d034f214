"""The scores as guided-diffusion's evaluator.py defines them, in numpy and scipy alone: what ours are compared with."""

import numpy as np
import scipy.linalg


def frechet(one, other):
    """FID and sFID of features (n, d) and (m, d)."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    sigma_1, sigma_2 = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = scipy.linalg.sqrtm(sigma_1 @ sigma_2)
    difference = one.mean(axis=0) - other.mean(axis=0)
    return difference @ difference + np.trace(sigma_1) + np.trace(sigma_2) - 2 * np.trace(root.real)


def inception_score(logits, split=5000):
    """Of logits (n, C) in order."""
    exponentials = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True))
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    scores = []
    for lo in range(0, len(p), split):
        part = p[lo : lo + split]
        kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(kl.sum(axis=1).mean()))
    return np.mean(scores)


def precision_and_recall(samples, real, k=3):
    """By squared distances, each to each."""
    samples, real = np.asarray(samples, np.float64), np.asarray(real, np.float64)

    def squared(a, b):
        return ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)

    def radii(a):
        return np.sort(squared(a, a), axis=1)[:, k]  # the first is the point itself

    def inside(a, b):
        """The fraction of `a` in a ball around a point of `b`."""
        return (squared(a, b) <= radii(b)).any(axis=1).mean()

    return inside(samples, real), inside(real, samples)


def kernel_distance(samples, real):
    """The unbiased squared MMD of whole sets under (x·y / d + 1)³, pair by pair."""
    samples, real = np.asarray(samples, np.float64), np.asarray(real, np.float64)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a):
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return among(samples) + among(real) - 2 * kernel(samples, real).mean()
