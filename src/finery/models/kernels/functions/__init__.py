"""What the kernels compute, with torch; the parts beside this folder can be listed and read without it."""
