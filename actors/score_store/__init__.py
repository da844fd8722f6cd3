"""The teacher's scores on disk: encoding, identity, leases, checks; no engine and no student."""
