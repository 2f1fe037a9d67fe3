"""Several server processes behind one address: who holds the ports, starts the workers, and shows their metrics as one."""
