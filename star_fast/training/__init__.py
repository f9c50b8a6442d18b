"""Running the method: batches, DeepSpeed engine, loop, checkpoints, telemetry."""
