"""What was shown: exposures on their way to PostgreSQL."""
