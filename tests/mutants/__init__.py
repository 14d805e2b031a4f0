"""Mutation testing: small faults put into the engine one at a time, each of which some test must see."""
