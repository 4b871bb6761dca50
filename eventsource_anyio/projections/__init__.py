"""Read models: what makes them, and what runs it."""
