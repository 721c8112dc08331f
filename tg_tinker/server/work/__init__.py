"""Work: operations, their order in each run, and the threads that they run on."""
