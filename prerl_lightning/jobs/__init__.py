"""`prerl job`: runs on machines of Lightning AI."""
