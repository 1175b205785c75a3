"""Programs that throw arbitrary bytes at the parts that take bytes from strangers."""
