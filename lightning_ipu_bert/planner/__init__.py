"""Planning without hardware: what a plan costs in time and memory before anything runs."""
