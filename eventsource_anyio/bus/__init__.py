"""How other parts of a program hear of events."""
