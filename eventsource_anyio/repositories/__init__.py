"""What a store keeps beside its events: checkpoints, and the outbox."""
