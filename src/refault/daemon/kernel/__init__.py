"""Linux asked and told: a process or a descriptor in, a fact out. It knows no VM."""
