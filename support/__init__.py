"""What every program needs and no paper mentions."""
