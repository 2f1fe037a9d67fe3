"""What texts mean: their vectors by the active model."""
