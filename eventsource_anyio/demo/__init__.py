"""A program to learn from: `fines` is the domain, `log` the input, `work` what is done with it."""
