"""Language models: loading, attention, head, log-probabilities, adapters, sharding."""
