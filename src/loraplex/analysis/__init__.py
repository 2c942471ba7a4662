"""Looking into finished adapters."""
