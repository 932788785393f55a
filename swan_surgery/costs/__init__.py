"""What a model costs, and what it would cost at any open units: MACs, parameters, milliseconds."""
