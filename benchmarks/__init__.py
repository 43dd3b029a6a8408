"""Commands that measure what the README claims: ``python -m benchmarks``, and its modules alone."""
