"""Command lines and terminal output: the commands ``run``, ``evaluate`` and ``report``."""
