"""One run: its folder, lock, loggers and SLURM job."""
