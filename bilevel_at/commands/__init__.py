"""What parses arguments or prints: the commands ``run``, ``evaluate`` and ``report``."""
