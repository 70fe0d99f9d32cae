"""fp8, int8 and nf4: the quantised Linears (`linears`), and models loaded with them (`load`)."""
