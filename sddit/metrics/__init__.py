"""Scores of samples: features, their statistics, distances, and the protocol that each number travels with."""
