"""Measures this machine: the engine, the whole line, the queue and the storage, each against what it is made of."""
