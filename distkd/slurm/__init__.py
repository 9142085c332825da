"""SLURM: what is submitted, what became of it, and whether a job goes back to the queue."""
