"""Training: torch lives here (and in export), nowhere else."""
