"""Planning without hardware: time and memory of a plan before anything runs."""
