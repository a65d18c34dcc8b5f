"""One run: its folder, lock, loggers, signals and SLURM job."""
