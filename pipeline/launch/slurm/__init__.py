"""Stages as Slurm jobs: what they ask for, their dependencies, their records, and where they stand."""
