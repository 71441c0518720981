"""A seeded archive of simulated scenes, for the demo and the tests: real formats, real quirks, no network."""
