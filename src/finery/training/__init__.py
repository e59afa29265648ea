"""Training: the one Trainer, its arguments, its steps and what it writes."""
