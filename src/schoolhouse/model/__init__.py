"""The student: loading it, what its family needs, its packed attention."""
