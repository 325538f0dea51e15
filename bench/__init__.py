"""The benchmark: parity first, then speed, memory and the distance to this machine's ceilings."""
