"""What a run would take on GPUs that are not here: counted work, rates, and the time and memory that follow."""
