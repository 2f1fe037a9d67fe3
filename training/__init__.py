"""Offline: dataset, model, train, evaluate, export, publish."""
