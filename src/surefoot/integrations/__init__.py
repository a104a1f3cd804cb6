"""One lazy adapter a file: `transformers`, `lightning`, `optax`. Each needs the extra of its name."""
