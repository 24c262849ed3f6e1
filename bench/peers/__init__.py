"""Other trainers on the same work: a runner for each, in an environment of its own."""
