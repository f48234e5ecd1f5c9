"""The serving path: wire messages, broker, token log, worker, session manager."""
