"""What a run will take before it starts: shapes, memory, bytes, hours, and whether a cluster has it; only a probe is started."""
