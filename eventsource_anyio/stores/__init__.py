"""Where events are kept: the interface, and one module a store."""
