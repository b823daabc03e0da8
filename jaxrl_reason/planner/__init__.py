"""What a run needs and how long it takes, before any device is paid for."""
