"""Evaluation of networks: features, kNN, logistic regression, and the scores of a classifier."""
